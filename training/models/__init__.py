"""Models: built, found, converted, sized and saved."""
