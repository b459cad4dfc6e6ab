"""Inpainting: images of any size through a network that works on one square."""
