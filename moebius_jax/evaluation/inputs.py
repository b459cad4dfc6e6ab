"""A look at all inputs before anything is painted: do the masks fit, and what exactly is evaluated?"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from moebius_jax.errors import UserError
from moebius_jax.evaluation.cases import Case, read_hole, read_truth
from moebius_jax.evaluation.masks import hole_digest, set_hash
from moebius_jax.evaluation.metrics.lpips import require_size
from moebius_jax.evaluation.prefetch import prefetch

_MOST_PROBLEMS = 20  # lines shown


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
    size: int | None,
    invert_masks: bool,
    metrics: Sequence[str],
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> Inputs:
    """Reads every original and every mask: a file that cannot be used is found before hours of painting.

    Args:
        cases: with masks.
        size: masks have to be size x size; None: of their image's size.
        invert_masks: black is the hole.
        metrics: that results will be scored with.
        track: wraps the loop, as tqdm does.

    Raises:
        UserError: files cannot be read, or masks have another size; a line for each of the first.
    """

    def read(case: Case) -> tuple[bytes, bytes, float] | UserError:
        try:
            rgb = read_truth(case, None)
            if size is None and "lpips" in metrics:
                require_size(rgb.shape[:2], str(case.truth))
            hole = read_hole(case.mask, rgb if size is None else None, invert=invert_masks)
            with case.truth.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            return UserError(f"{case.truth}: cannot be read ({error.strerror or error})")
        except UserError as error:
            return error
        if size is not None and hole.shape != (size, size):
            height, width = hole.shape
            return UserError(
                f"{case.mask}: the mask is {width} x {height} pixels, expected {size} x {size}, to which "
                "images are resized and cropped (--size; --size original leaves them as they are)"
            )
        return digest, hole_digest(hole), float(hole.mean())

    found = list(track(prefetch(read, cases), desc="checking inputs", total=len(cases)))
    problems = [str(item) for item in found if isinstance(item, UserError)]
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} of {len(cases)} inputs cannot be used:\n{lines_of(problems)}")
    return Inputs(
        images_sha256=set_hash({c.name: image for c, (image, _, _) in zip(cases, found, strict=True)}),
        masks_sha256=set_hash({c.mask_name: mask for c, (_, mask, _) in zip(cases, found, strict=True)}),
        pairs_sha256=set_hash({c.name: mask for c, (_, mask, _) in zip(cases, found, strict=True)}),
        ratios=np.array([ratio for _, _, ratio in found]),
    )


def lines_of(problems: Sequence[str]) -> str:
    """The first of many problems, a line each, and how many more there are."""
    rest = len(problems) - _MOST_PROBLEMS
    shown = [*problems[:_MOST_PROBLEMS], *([f"… and {rest} more"] if rest > 0 else [])]
    return "\n".join(f"  {line}" for line in shown)


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
