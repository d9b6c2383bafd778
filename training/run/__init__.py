"""Runs: stages, resume, dry run, comparison, evaluation."""
