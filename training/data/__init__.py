"""Readers of documents, one file per source behind one protocol; tokenizers, tokens and rows."""
