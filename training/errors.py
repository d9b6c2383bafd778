"""Mistakes of the user, each told in one line."""


class RecipeError(ValueError):
    """A mistake in what the user asked for; its message is one line that names it and the way out."""
