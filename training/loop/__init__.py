"""The training loop, its ranks, checkpoints and signals."""
