"""One training sample: an image, its hole and its task, drawn with a NumPy generator of its own."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Bool
from PIL import Image
from pydantic import Field

from moebius_jax.data.random_masks import PRESETS, mask_generator
from moebius_jax.data.records import TASKS, Record
from moebius_jax.data.samples import PixelSample
from moebius_jax.errors import UserError
from moebius_jax.imaging.masks import THRESHOLD, dilate
from moebius_jax.imaging.picture import read_mask, read_picture
from moebius_jax.schema import Probability, checked, one_of

_DILATIONS = (3, 5, 7)
_MEGAPIXELS, _NARROWEST = 120, 32  # what a picture may have, as a whole and as one side to the other


@checked
class AugmentConfig:
    """How a file becomes a sample (docs/data.md); probabilities are the release's.

    Attributes:
        image_size: side of the square samples, pixels.
        masks: random-mask presets, drawn from with equal probability.
        random_mask: probability of a random mask for a background sample that has a mask file.
        foreground_masks: folder of masks of objects; background masks are intersected with one of them
            with probability `intersection`.
        intersection: see there.
        dilation: probability of growing the mask by a square of 3, 5 or 7, once or twice.
        flip: probability of a horizontal flip.

    Raises:
        ValueError: a field is out of range.
    """

    image_size: Annotated[int, Field(ge=8, le=8192)] = 512
    masks: Annotated[tuple[Annotated[str, one_of(PRESETS)], ...], Field(min_length=1)] = (
        "thin_512",
        "medium_512",
        "thick_512",
    )
    random_mask: Probability = 0.5
    foreground_masks: str | None = None
    intersection: Probability = 0.5
    dilation: Probability = 0.99
    flip: Probability = 0.5


def draw_sample(
    record: Record, config: AugmentConfig, foreground: Sequence[Path], rng: np.random.Generator
) -> PixelSample:
    """Loads and augments a sample.

    The image's short side is resized to the sample's; a square is cut from the long side, anywhere for a
    random mask (which is drawn on the square), and for a file's so that it shows at least half of the hole's
    extent.

    Args:
        record: files and task.
        config: see there.
        foreground: mask files to intersect with.
        rng: all randomness.

    Raises:
        UserError: a file is missing or unreadable, or image and mask differ in size.
    """
    size = config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's about single files would come once per epoch and worker
        image = read_picture(record.image, max_megapixels=_MEGAPIXELS).rgb
        use_file = record.mask is not None and (
            record.task == "foreground" or rng.random() >= config.random_mask
        )
        grey = read_mask(record.mask, max_megapixels=_MEGAPIXELS) if use_file else None
    if grey is not None and grey.shape != image.shape[:2]:
        raise UserError(
            f"{record.mask}: {grey.shape[1]} x {grey.shape[0]} pixels; its image has "
            f"{image.shape[1]} x {image.shape[0]}"
        )
    if max(image.shape[:2]) > _NARROWEST * min(image.shape[:2]):
        raise UserError(
            f"{record.image}: {image.shape[1]} x {image.shape[0]} pixels; expected no side more than "
            f"{_NARROWEST} times the other"
        )
    image = _short_side(image, size, Image.Resampling.LANCZOS)
    if grey is None:
        corner = [int(rng.integers(n - size + 1)) for n in image.shape[:2]]
        hole = mask_generator(config.masks[rng.integers(len(config.masks))])(rng, size)
    else:
        whole = _short_side(grey, size, Image.Resampling.BILINEAR) > THRESHOLD
        corner = [_offset(whole.any(1 - axis), size, rng) for axis in (0, 1)]
        hole = whole[corner[0] : corner[0] + size, corner[1] : corner[1] + size]
    if record.task == "background" and foreground and rng.random() < config.intersection:
        hole = _intersect(hole, foreground[rng.integers(len(foreground))])
    if rng.random() < config.dilation:
        square, times = rng.choice(_DILATIONS), rng.integers(1, 3)
        # Twice by a square of s is once by one of 2s - 1.
        hole = dilate(hole, int(times * (square - 1) + 1))
    image = image[corner[0] : corner[0] + size, corner[1] : corner[1] + size]
    if rng.random() < config.flip:
        image, hole = image[:, ::-1], hole[:, ::-1]
    return PixelSample(
        image=np.ascontiguousarray(image),
        hole=np.ascontiguousarray(hole),
        task=np.int32(TASKS.index(record.task)),
    )


def _short_side(array: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    H, W = array.shape[:2]
    scale = size / min(H, W)
    target = (max(size, round(W * scale)), max(size, round(H * scale)))
    return np.asarray(Image.fromarray(array).resize(target, resample))


def _offset(is_hole: Bool[np.ndarray, " n"], size: int, rng: np.random.Generator) -> int:
    """Where a window of `size` starts so that it shows at least half of the hole's extent."""
    last = len(is_hole) - size
    where = np.flatnonzero(is_hole)
    if not len(where) or last == 0:
        return int(rng.integers(last + 1))
    first, end = int(where[0]), int(where[-1]) + 1
    half = min(-(-(end - first) // 2), size)
    low = max(0, first + half - size)
    high = min(last, end - half)
    return int(rng.integers(low, high + 1))


def _intersect(hole: Bool[np.ndarray, "S S"], other: Path) -> Bool[np.ndarray, "S S"]:
    """The common part; `hole` itself where there is none, since a sample without a hole teaches nothing."""
    size = Image.fromarray(read_mask(other)).resize(hole.shape[::-1], Image.Resampling.BILINEAR)
    common = hole & (np.asarray(size) > THRESHOLD)
    return common if common.any() else hole
