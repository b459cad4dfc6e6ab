"""Original, mask and result in one picture."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from moebius_jax.imaging.picture import mark_of

MARK = "original | mask | result"  # what `is_grid` tells a result's grid by
GAP = 8  # pixels of white between the panels
MAX_SIDE = 768  # panels are shrunk to this: the grid is for looking, not for keeping


def side_by_side(*panels: UInt8[np.ndarray, "..."]) -> Image.Image:
    """Images (grey or RGB) in a row, each at the first one's aspect and size."""
    H, W = panels[0].shape[:2]
    scale = min(1.0, MAX_SIDE / max(H, W))
    size = max(1, round(W * scale)), max(1, round(H * scale))
    images = [
        Image.fromarray(panel).convert("RGB").resize(size, Image.Resampling.LANCZOS) for panel in panels
    ]
    grid = Image.new("RGB", (len(images) * (size[0] + GAP) - GAP, size[1]), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i * (size[0] + GAP), 0))
    return grid


def is_grid(path: Path) -> bool:
    """Whether a file was written with `MARK`; only those named like a grid are opened."""
    return path.stem.endswith("_grid") and mark_of(path) == MARK
