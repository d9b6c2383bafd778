"""Scorers: what turns a batch of tokens into token weights. Each is one file with one class."""
