"""HTTP ↔ domain: OpenAI's wire on the outside, `ChatRequest` and events on the inside."""
