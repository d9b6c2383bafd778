"""Speculative decoding with prediction heads as the draft."""
