"""Models: sources, conversion, building, optimizer, sizes, saving."""
