"""Recipes: their schema, defaults, overrides and error messages. Nothing here imports torch."""
