"""Layouts in which serving engines read prediction heads."""
