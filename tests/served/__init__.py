"""The vLLM plugin as far as no engine is needed, and its results."""
