"""The training loop, its ranks, checkpoints and token weights."""
