"""The prefill role: turns prompts into KV cache and hands it to decode nodes."""
