"""A real engine on loopback: what it answers and how fast, with images compressed and whole.

Runs in an environment of its own, which `make test-vllm` makes. `check` compares an engine's
answers with those of transformers, `load` measures it under requests that run at once.
"""
