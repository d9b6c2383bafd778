"""Recipes: their schema, defaults, overrides and errors."""
