"""Command lines: train-mtp, eval-mtp, export-mtp."""
