"""Noise: how it is drawn, added and taken away again. Pure functions of arrays and keys."""
