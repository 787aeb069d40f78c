"""A fleet on a virtual clock: the real scheduler and routing, a latency model for the model."""
