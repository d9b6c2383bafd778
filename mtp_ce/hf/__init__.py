"""Models of transformers: the wrapper, its trainer, reading and writing checkpoints."""
