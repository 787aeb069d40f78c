"""Tool calls and reasoning within a model's text."""
