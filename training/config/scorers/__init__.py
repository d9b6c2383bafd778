"""Scorers of the trainer: one file each with its options and its needs, and a table."""
