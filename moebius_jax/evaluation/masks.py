"""Sets of masks in folders: drawn from a seed, described by a README, recognised by a hash."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool
from PIL import Image
from pydantic import Field

from moebius_jax.data.random_masks import mask_generator
from moebius_jax.errors import UserError
from moebius_jax.files import AlreadyThere, remove_remains, replace_when_complete
from moebius_jax.schema import AtLeastOne, AtLeastZero, Probability, checked, one_of, read_json

Hole = Bool[np.ndarray, "S S"]

KINDS = {
    "lama_thin": "LaMa's thin strokes",
    "lama_medium": "LaMa's medium strokes and boxes",
    "lama_thick": "LaMa's thick strokes and large boxes",
    "mat_large": "MAT's large free-form masks, drawn from their description: rectangles and winding strokes",
    "mat_small": "MAT's small free-form masks, likewise; at most half is hole",
    "comodgan": "CoModGAN's free-form masks, drawn from their description",
}
DESCRIPTION_FILE = "masks.json"
POLARITY = "white (255) is the hole, what is repainted; black (0) is kept"

_ATTEMPTS = 10_000
_README = """\
# {count} masks of {size} x {size} pixels

Polarity: **{polarity}**. (MAT's and CoModGAN's own files are the other way round.)

| | |
|---|---|
| kind | `{kind}`: {description} |
| share of the image that is hole | {ratio} |
| seed | {seed} |
| SHA-256 of the set | `{sha256}` |

Mask number i depends on the seed and i only. The hash is over the names (without suffix, in sorted order) and
the pixels, not over the files' bytes, so re-encoding keeps it. Made by `python -m moebius_jax.masks`.
"""


@checked
class MaskSpec:
    """What a set is drawn from.

    Attributes:
        kind: one of `KINDS`.
        size: side in pixels.
        seed: 0 or more.
        min_ratio, max_ratio: draws whose hole is not within these shares of the image are drawn again.

    Raises:
        UserError: a value is out of range.
    """

    kind: Annotated[str, one_of(KINDS)]
    size: Annotated[int, Field(ge=64, le=2**14)] = 512
    seed: AtLeastZero = 0
    min_ratio: Probability = 0.0
    max_ratio: Probability = 1.0

    def __post_init__(self) -> None:
        if not self.min_ratio < self.max_ratio:
            raise ValueError(f"ratio is {self.min_ratio} to {self.max_ratio}; expected 0 <= low < high <= 1")

    def draw(self, index: int) -> Hole:
        """Mask number `index`; True is hole.

        Raises:
            UserError: the kind hardly ever has such a ratio.
        """
        preset = self.kind
        if preset.startswith("lama_"):
            preset = f"{preset.removeprefix('lama_')}_{256 if self.size <= 256 else 512}"
        generator = mask_generator(preset)
        rng = np.random.default_rng([self.seed, index])
        for _ in range(_ATTEMPTS):
            hole = generator(rng, self.size)
            if self.min_ratio <= hole.mean() <= self.max_ratio and hole.any():
                return hole
        raise UserError(
            f"{self.kind} masks of {self.size} px with {self.min_ratio:.0%} to {self.max_ratio:.0%} hole: "
            f"none in {_ATTEMPTS} draws; choose another kind or ratio"
        )


@checked
class MaskSet(MaskSpec):
    """What `masks.json` says of a set.

    Attributes:
        count: of masks.
        sha256: of names and pixels.
        polarity: which grey is hole.
    """

    count: AtLeastOne
    sha256: str
    polarity: Literal["white (255) is the hole, what is repainted; black (0) is kept"] = POLARITY


def write_set(
    folder: Path,
    spec: MaskSpec,
    names: Sequence[str],
    *,
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> str:
    """Draws a set into a folder, which appears under its name only when complete.

    Args:
        folder: to make; holds `NAME.png` (1 bit a pixel), README.md and masks.json.
        spec: what to draw.
        names: of the masks, in the order of their numbers; may hold subfolders.
        track: wraps the loop, as tqdm does.

    Returns:
        The set's hash.

    Raises:
        UserError: the folder exists or cannot be written, or the ratio cannot be met.
    """
    if folder.exists():
        raise AlreadyThere(folder, "a mask set is never changed, choose another folder")
    remove_remains(folder.parent)
    digests = {}
    with replace_when_complete(folder, overwrite=False) as partial:
        for index, name in enumerate(track(names, desc="masks")):
            hole = spec.draw(index)
            file = partial / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(hole).save(file)
            digests[name] = hole_digest(hole)
        partial.mkdir(exist_ok=True)
        digest = set_hash(digests)
        made = MaskSet(**dataclasses.asdict(spec), count=len(names), sha256=digest)
        values = dataclasses.asdict(made)
        (partial / DESCRIPTION_FILE).write_text(json.dumps(values, indent=2) + "\n")
        ratio = f"{spec.min_ratio:.0%} to {spec.max_ratio:.0%}"
        if (spec.min_ratio, spec.max_ratio) == (0, 1):
            ratio = "as drawn"
        text = _README.format(**values, description=KINDS[spec.kind], ratio=ratio)
        (partial / "README.md").write_text(text)
    return digest


def read_description(folder: Path) -> MaskSet | None:
    """What `masks.json` says of a set; None for a folder without one.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_json(folder / DESCRIPTION_FILE, MaskSet)
    except FileNotFoundError:
        return None


def hole_digest(hole: Bool[np.ndarray, "H W"]) -> bytes:
    """Digest of one mask's size and pixels."""
    return hashlib.sha256(repr(hole.shape).encode() + np.packbits(hole).tobytes()).digest()


def set_hash(digests: dict[str, bytes]) -> str:
    """Hash of a set from the digests of its items by name."""
    total = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        total.update(name.encode() + b"\0" + digest)
    return total.hexdigest()
