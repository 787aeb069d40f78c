"""A fleet on a virtual clock: the real scheduler and routing, with a latency model for the model."""
