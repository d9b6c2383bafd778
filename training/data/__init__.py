"""Corpora, tokenizers, tokens and rows."""
