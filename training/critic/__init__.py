"""The critic of critic_delta and its training."""
