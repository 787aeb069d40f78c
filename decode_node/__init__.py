"""The decode role: receives the KV cache of prompts and generates the answers."""
