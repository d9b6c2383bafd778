"""Prediction heads: one file per kind."""
