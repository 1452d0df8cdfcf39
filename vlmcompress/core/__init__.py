"""Pure data and arithmetic: no transformers, no hooks."""
