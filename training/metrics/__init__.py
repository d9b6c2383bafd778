"""Metrics of prediction heads: cross entropy, accuracy, acceptance."""
