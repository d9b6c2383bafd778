"""Torch operators and autograd of both losses, the chunked linear path and the CPU path."""
