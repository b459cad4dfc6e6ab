"""A look at all inputs before anything is painted: do the masks fit, and what exactly is evaluated?"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import Case, read_hole
from moebius_jax.evaluation.mask_sets import hole_digest, set_hash
from moebius_jax.evaluation.prefetch import prefetch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a benchmark is run on.

    Attributes:
        images_sha256: of the originals' names and files.
        masks_sha256: of the masks' own names and pixels; that of their set if all of it is used.
        pairs_sha256: of the masks by the names of their images.
        ratios: share of each image that is hole.
    """

    images_sha256: str
    masks_sha256: str
    pairs_sha256: str
    ratios: Float[np.ndarray, " N"]


def inspect(
    cases: Sequence[Case],
    *,
    size: int,
    invert_masks: bool,
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> Inputs:
    """Reads every original's bytes and every mask.

    Args:
        cases: with masks.
        size: masks have to be size x size.
        invert_masks: black is the hole.
        track: wraps the loop, as tqdm does.

    Raises:
        UserError: a file cannot be read, or a mask has another size.
    """

    def read(case: Case) -> tuple[bytes, bytes, float]:
        try:
            with case.truth.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise UserError(f"{case.truth}: cannot be read ({error.strerror or error})") from None
        hole = read_hole(case.mask, invert=invert_masks)
        if hole.shape != (size, size):
            height, width = hole.shape
            raise UserError(
                f"{case.mask}: the mask is {width} x {height} pixels, expected {size} x {size}, to which "
                "images are resized and cropped (--size)"
            )
        return digest, hole_digest(hole), float(hole.mean())

    found = list(track(prefetch(read, cases), desc="checking inputs", total=len(cases)))
    return Inputs(
        images_sha256=set_hash({c.name: image for c, (image, _, _) in zip(cases, found, strict=True)}),
        masks_sha256=set_hash({c.mask_name: mask for c, (_, mask, _) in zip(cases, found, strict=True)}),
        pairs_sha256=set_hash({c.name: mask for c, (_, mask, _) in zip(cases, found, strict=True)}),
        ratios=np.array([ratio for _, _, ratio in found]),
    )


def odd_masks(names: Sequence[str], ratios: Float[np.ndarray, " N"]) -> list[str]:
    """A line each if some masks are all black or all white.

    Args:
        names: of the images.
        ratios: share of each that is hole; NaN without a mask.
    """
    lines = []
    for value, what in (
        (0, "have no hole and count for whole pictures only"),
        (1, "are all hole (is black the hole? --invert-masks)"),
    ):
        found = np.flatnonzero(ratios == value)
        if len(found):
            lines.append(f"{len(found)} of {len(names)} masks {what}; the first is that of {names[found[0]]}")
    return lines
