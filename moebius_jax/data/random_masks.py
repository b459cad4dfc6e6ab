"""Random holes: LaMa's six presets, and the free-form masks of CoModGAN and MAT.

Each generator is a function of a NumPy generator and a size. LaMa's follow the release, draw by draw in
distribution (`tests/golden/mask_statistics.json`). The other two follow the published descriptions:
rectangles of up to half and of up to the whole side, and strokes of many short thick segments. MAT's large
masks are CoModGAN's; of its small ones at most half is covered, and counts are halved: our reading.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

Hole = Bool[np.ndarray, "S S"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strokes:
    """LaMa's irregular masks; lengths in pixels. Ranges include both ends.

    Attributes:
        min_times, max_times: strokes; the release draws up to one more than `max_times`.
        max_width, max_len: brush is 5 + U{0..max_width-1}, a segment 10 + U{0..max_len-1} long.
        max_angle: a segment's angle is 0.01 + U{0..max_angle-1} radians.
    """

    min_times: int
    max_times: int
    max_width: int
    max_len: int
    max_angle: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes:
    """LaMa's box masks; lengths in pixels. Ranges include both ends."""

    min_times: int
    max_times: int
    min_size: int
    max_size: int
    margin: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """Strokes, or, with probability `box_probability`, boxes; made for squares of side `size`."""

    size: int
    strokes: Strokes
    boxes: Boxes | None = None
    box_probability: float = 0.0

    def draw(self, rng: np.random.Generator, size: int) -> Hole:
        """A hole in a square of any side: lengths are scaled from the preset's own."""
        return self.draw_on(rng, size, size)

    def draw_on(self, rng: np.random.Generator, height: int, width: int) -> Bool[np.ndarray, "height width"]:
        """A hole in a whole picture; its shorter side is a square's."""
        scale = min(height, width) / self.size
        if self.boxes is not None and rng.random() < self.box_probability:
            return _boxes(rng, (height, width), self.boxes, scale)
        return _strokes(rng, (height, width), self.strokes, scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeForm:
    """Rectangles and winding strokes, as CoModGAN and MAT.

    Attributes:
        half_boxes, boxes: at most this many rectangles (exclusive) of sides up to half, and the whole side.
        strokes: at most this many strokes (exclusive).
        min_ratio, max_ratio: draws with a hole outside these shares of the image are drawn again.
    """

    half_boxes: int
    boxes: int
    strokes: int
    min_ratio: float = 0.0
    max_ratio: float = 1.0

    def draw(self, rng: np.random.Generator, size: int) -> Hole:
        """A hole in a square of side `size`."""
        while True:
            hole = _free_form(rng, size, self)
            if self.min_ratio < hole.mean() < self.max_ratio:
                return hole


def _mixed(size: int, strokes: Strokes, boxes: Boxes | None = None) -> Mixed:
    # The release's weights are 1 and 0.3, normalised.
    return Mixed(size=size, strokes=strokes, boxes=boxes, box_probability=0.3 / 1.3 if boxes else 0.0)


PRESETS: dict[str, Mixed | FreeForm] = {
    "thin_256": _mixed(256, Strokes(min_times=4, max_times=50, max_width=10, max_len=40)),
    "medium_256": _mixed(
        256,
        Strokes(min_times=4, max_times=5, max_width=50, max_len=100),
        Boxes(min_times=1, max_times=5, min_size=10, max_size=50, margin=0),
    ),
    "thick_256": _mixed(
        256,
        Strokes(min_times=1, max_times=5, max_width=100, max_len=200),
        Boxes(min_times=1, max_times=3, min_size=30, max_size=150, margin=10),
    ),
    "thin_512": _mixed(512, Strokes(min_times=4, max_times=70, max_width=20, max_len=100)),
    "medium_512": _mixed(
        512,
        Strokes(min_times=4, max_times=10, max_width=100, max_len=200),
        Boxes(min_times=1, max_times=5, min_size=30, max_size=150, margin=0),
    ),
    "thick_512": _mixed(
        512,
        Strokes(min_times=1, max_times=5, max_width=250, max_len=450),
        Boxes(min_times=1, max_times=4, min_size=30, max_size=300, margin=10),
    ),
    "comodgan": FreeForm(half_boxes=5, boxes=3, strokes=9),
    "mat_large": FreeForm(half_boxes=5, boxes=3, strokes=9),
    "mat_small": FreeForm(half_boxes=2, boxes=1, strokes=4, max_ratio=0.5),
}


def _strokes(rng: np.random.Generator, shape: tuple[int, int], p: Strokes, scale: float) -> Hole:
    width_height = shape[::-1]
    image = Image.new("1", width_height)
    canvas = ImageDraw.Draw(image)
    for stroke in range(rng.integers(p.min_times, p.max_times + 2)):
        point = np.array([float(rng.integers(0, n)) for n in width_height])
        for _ in range(rng.integers(1, 6)):
            angle = 0.01 + rng.integers(p.max_angle)
            if stroke % 2 == 0:
                angle = 2 * math.pi - angle
            length = scale * (10 + rng.integers(p.max_len))
            brush = scale * (5 + rng.integers(p.max_width))
            end = np.clip(point + length * np.array([math.sin(angle), math.cos(angle)]), 0, width_height)
            _capsule(canvas, point, end, brush / 2)
            point = end
    return _hole_of(image)


def _boxes(rng: np.random.Generator, shape: tuple[int, int], p: Boxes, scale: float) -> Hole:
    hole = np.zeros(shape, bool)
    margin = round(scale * p.margin)
    smallest, largest = round(scale * p.min_size), min(round(scale * p.max_size), min(shape) - 2 * margin)
    for _ in range(rng.integers(p.min_times, p.max_times + 1)):
        width, height = rng.integers(smallest, largest + 1, 2)
        x = rng.integers(margin, shape[1] - margin - width + 1)
        y = rng.integers(margin, shape[0] - margin - height + 1)
        hole[y : y + height, x : x + width] = True
    return hole


def _free_form(rng: np.random.Generator, size: int, p: FreeForm) -> Hole:
    image = Image.new("1", (size, size))
    canvas = ImageDraw.Draw(image)
    for limit, largest in ((p.half_boxes, size // 2), (p.boxes, size)):
        for _ in range(rng.integers(limit)):
            width, height = rng.integers(largest, size=2)
            x, y = (
                rng.integers(-(width // 2), size - width // 2),
                rng.integers(-(height // 2), size - height // 2),
            )
            canvas.rectangle((x, y, x + width, y + height), fill=1)
    for _ in range(rng.integers(p.strokes)):
        _winding_stroke(rng, canvas, size)
    hole = _hole_of(image)
    if rng.random() < 0.5:
        hole = hole[:, ::-1]
    return hole[::-1] if rng.random() < 0.5 else hole


def _hole_of(image: Image.Image) -> Hole:
    # Not np.asarray(image): its True is a byte of 255, which XLA reads as a number (`sharding.plain_bools`).
    return np.asarray(image.convert("L")) > 0


def _winding_stroke(rng: np.random.Generator, canvas: ImageDraw.ImageDraw, size: int) -> None:
    """4 to 17 segments that turn to and fro around 2π/5, all of one width of 12 to 47 pixels.

    Each stroke draws how far its turns are from 2π/5, up to 2π/15 either way.
    """
    turn, spread = 2 * math.pi / 5, 2 * math.pi / 15
    least, most = turn - rng.uniform(0, spread), turn + rng.uniform(0, spread)
    typical = math.sqrt(2) * size / 8
    radius = rng.integers(12, 48) / 2
    point = rng.integers(0, size, 2).astype(float)
    for i in range(rng.integers(4, 18)):
        angle = rng.uniform(least, most)
        if i % 2 == 0:
            angle = 2 * math.pi - angle
        length = float(np.clip(rng.normal(typical, typical / 2), 0, 2 * typical))
        end = np.clip(point + length * np.array([math.cos(angle), math.sin(angle)]), 0, size)
        _capsule(canvas, point, end, radius)
        point = end


def _capsule(canvas: ImageDraw.ImageDraw, a: np.ndarray, b: np.ndarray, radius: float) -> None:
    """A thick line with round ends. PIL fills every pixel an edge runs through, half a pixel all round."""
    along = b - a
    length = math.hypot(*along)
    if length > 0:
        side = radius * np.array([-along[1], along[0]]) / length
        canvas.polygon([tuple(p) for p in (a + side, b + side, b - side, a - side)], fill=1)
    for x, y in (a, b):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)


def mask_generator(name: str) -> Callable[[np.random.Generator, int], Hole]:
    """The preset's function of a generator and a size.

    Raises:
        KeyError: there is no such preset.
    """
    return PRESETS[name].draw
