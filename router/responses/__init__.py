"""OpenAI's Responses: /v1/responses, streamed or not, and what is kept of them."""
