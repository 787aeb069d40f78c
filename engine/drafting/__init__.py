"""Speculation: who proposes the next tokens, how many of them, and what came of it."""
