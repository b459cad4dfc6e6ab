"""Original, mask and result in one picture."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from moebius_jax.imaging.picture import mark_of, write_image

_MARK = "original | mask | result"
_ENDING = "_grid"
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


def grid_path(output: Path) -> Path:
    """Where the side-by-side picture of a result goes."""
    return output.with_name(f"{output.stem}{_ENDING}.png")


def write_grid(output: Path, *panels: UInt8[np.ndarray, "..."], overwrite: bool) -> None:
    """Puts `side_by_side` beside the result `output`; errors as for `write_image`."""
    write_image(grid_path(output), side_by_side(*panels), overwrite=overwrite, mark=_MARK)


def is_grid(path: Path) -> bool:
    """Whether `write_grid` wrote it; only files named like a grid are opened."""
    return path.stem.endswith(_ENDING) and mark_of(path) == _MARK
