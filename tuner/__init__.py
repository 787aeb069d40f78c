"""Load on an endpoint, and what can be learned from it: load generator, reports, latency models."""
