"""Prediction heads: one file per kind, a table of kinds that needs no torch, one protocol."""
