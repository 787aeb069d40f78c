"""Computation on tensors: torch references, which are the specification, and kernels beside."""
