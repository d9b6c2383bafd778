"""Scorers compute token weights for a batch of tokens. Each is one file with one class."""
