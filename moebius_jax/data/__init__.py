"""Training data: annotation files, random masks, samples, and the order they come in."""
