"""Where to cut: square windows around the regions of a hole."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int
from scipy import ndimage

Hole = Bool[np.ndarray, "H W"]
Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two exclusive

MERGE_GROWTH = 1.25  # two regions share a window if it is at most this much larger than the larger of theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """A square cut out of an image; it may reach beyond the image where the image is the smaller one.

    Attributes:
        top, left: of the square in image coordinates; negative where it starts outside.
        side: in pixels.
        labels: number of the region every pixel of the image belongs to, 0 for none; shared by all windows.
        regions: the numbers of those this window fills.
    """

    top: int
    left: int
    side: int
    labels: Int[np.ndarray, "H W"]
    regions: tuple[int, ...]

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of the image the window covers."""
        H, W = self.labels.shape
        return (
            slice(max(self.top, 0), min(self.top + self.side, H)),
            slice(max(self.left, 0), min(self.left + self.side, W)),
        )

    @property
    def covered(self) -> tuple[slice, slice]:
        """Rows and columns of the window that lie in the image: its `inside`, from its own corner."""
        return tuple(
            slice(part.start - start, part.stop - start)
            for part, start in zip(self.inside, (self.top, self.left), strict=True)
        )

    @property
    def hole(self) -> Hole:
        """The part of the hole that this window fills, over its `inside`."""
        return np.isin(self.labels[self.inside], self.regions)


def plan_windows(hole: Hole, model_size: int, margin: int | None = None) -> list[Window]:
    """Windows that together cover a hole, one per far-apart region.

    A window is the region's bounding box with a margin, as a square (so the aspect is kept), moved inside
    the image where it fits. Without a margin given, half the box's longer side is left on every side, and
    the window is at least the model's square or the image's shorter side, whichever is less, so that small
    holes are not blown up.

    Args:
        hole: pixels to repaint, at least one.
        model_size: side of the model's square in pixels.
        margin: pixels of context around the box on every side; None chooses as above.
    """
    H, W = hole.shape
    least = 1 if margin is not None else min(model_size, H, W)
    most = max(H, W)

    def side(box: Box) -> int:
        extent = max(box[2] - box[0], box[3] - box[1])
        around = (extent + 1) // 2 if margin is None else margin
        return min(max(extent + 2 * around, least), most)

    labels, boxes = _regions(hole, cell=max(1, min(model_size, H, W) // 8))
    groups: list[tuple[Box, list[int]]] = []
    for label, region in enumerate(boxes, start=1):
        box, members = region, [label]
        # Growing by one group may bring the next within reach, so start over after each merge.
        while (near := _find_near(box, groups, side)) is not None:
            other, others = groups.pop(near)
            box = _union(box, other)
            members += others
        groups.append((box, members))
    windows = []
    for box, members in sorted(groups):
        s = side(box)
        top, left = (_place(box[i], box[i + 2], s, hole.shape[i]) for i in (0, 1))
        windows.append(Window(top=top, left=left, side=s, labels=labels, regions=tuple(members)))
    return windows


def _find_near(box: Box, groups: list[tuple[Box, list[int]]], side: Callable[[Box], int]) -> int | None:
    """Index of a group that `box` may share a window with."""
    for i, (other, _) in enumerate(groups):
        if side(_union(box, other)) <= MERGE_GROWTH * max(side(box), side(other)):
            return i
    return None


def _regions(hole: Hole, cell: int) -> tuple[np.ndarray, list[Box]]:
    """Connected regions, where pixels in the same or in touching cells of a coarse grid count as connected.

    The grid keeps a mask of ten thousand specks from being ten thousand regions.
    """
    H, W = hole.shape
    padded = np.pad(hole, ((0, -H % cell), (0, -W % cell)))
    coarse = padded.reshape(padded.shape[0] // cell, cell, padded.shape[1] // cell, cell).any((1, 3))
    coarse_labels, _ = ndimage.label(coarse, structure=np.ones((3, 3)))
    labels = np.where(hole, np.kron(coarse_labels, np.ones((cell, cell), coarse_labels.dtype))[:H, :W], 0)
    boxes = [(y.start, x.start, y.stop, x.stop) for y, x in ndimage.find_objects(labels)]
    return labels, boxes


def _union(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _place(low: int, high: int, side: int, length: int) -> int:
    """Start of a stretch of `side` centred on [low, high), inside [0, length) or centred over it."""
    if side >= length:
        return -((side - length) // 2)
    return min(max((low + high - side) // 2, 0), length - side)
