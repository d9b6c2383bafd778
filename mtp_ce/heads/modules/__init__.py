"""Layouts in which checkpoints store MTP modules: one file per layout, and a table of them."""
