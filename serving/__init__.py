"""One frozen base, many adapters: the engine behind `loramux serve` and its OpenAI-compatible API."""
