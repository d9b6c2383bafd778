"""Runs: stages, resuming, dry run, comparison, evaluation."""
