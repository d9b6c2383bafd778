"""Serving: one file per layout in which engines and checkpoints store a model or its heads, and a table of layouts."""
