"""The one table of metric names, and logging."""
