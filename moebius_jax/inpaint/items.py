"""What callers hand the pipeline, as items: PIL images or arrays, one or a list, seeds and indices."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from moebius_jax.errors import UserError
from moebius_jax.imaging.picture import Picture, mask_from_pil, picture_from_pil
from moebius_jax.inpaint.stream import Item

ImageLike = Image.Image | np.ndarray


def make_items(
    image: ImageLike | Sequence[ImageLike],
    mask_image: ImageLike | Sequence[ImageLike],
    seed: int | Sequence[int],
    image_indices: Sequence[int] | None,
) -> list[Item]:
    """One item for each image; arguments as for a call of the pipeline.

    Raises:
        UserError: something is no image, or the numbers of things do not agree.
    """
    pictures = [_picture(x, f"image {i}") for i, x in enumerate(_as_list(image))]
    masks = [_mask(x, f"mask {i}") for i, x in enumerate(_as_list(mask_image))]
    n = len(pictures)
    if len(masks) not in (1, n):
        raise UserError(f"{n} images and {len(masks)} masks; expected one mask, or one for each image")
    one_seed = not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str)
    seeds = [seed] * n if one_seed else list(seed)
    indices = list(image_indices) if image_indices is not None else list(range(n)) if one_seed else [0] * n
    if len(seeds) != n or len(indices) != n:
        raise UserError(f"{n} images, {len(seeds)} seeds and {len(indices)} image_indices; expected one each")
    for name, values in (("seed", seeds), ("image_indices", indices)):
        if wrong := [v for v in values if not isinstance(v, int | np.integer) or not 0 <= v < 2**32]:
            raise UserError(f"{name} is {wrong[0]!r}; expected whole numbers from 0 to 2**32 - 1")
    return [
        Item(
            rgb=picture.rgb,
            mask=masks[i % len(masks)],
            seed=seeds[i],
            index=indices[i],
            name=picture.name,
            mask_name=f"mask {i % len(masks)}",
            tag=picture,
        )
        for i, picture in enumerate(pictures)
    ]


def with_noise(
    items: list[Item], noise: Float[np.ndarray, "*N h w c"], shape: tuple[int, int, int]
) -> list[Item]:
    """The items with the noise each starts from.

    Args:
        items: of a call.
        noise: for all of them, or for each.
        shape: [h, w, c] of the network's latents.

    Raises:
        UserError: another shape, or numbers that are not finite.
    """
    if noise.shape not in (shape, (len(items), *shape)):
        each = " or ".join(map(str, dict.fromkeys((shape, (len(items), *shape)))))
        raise UserError(f"latents have shape {noise.shape}; expected {each}")
    if not np.isfinite(noise).all():
        raise UserError("latents hold NaN or infinite numbers")
    each = np.broadcast_to(noise, (len(items), *shape))
    return [dataclasses.replace(item, noise=own) for item, own in zip(items, each, strict=True)]


def _as_list(value: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if value is None or isinstance(value, str | Path):
        raise UserError(f"an image or mask is {value!r}; expected a PIL image, an array, or a list of them")
    # Anything with a shape is one array, jax's included.
    values = [value] if isinstance(value, Image.Image) or hasattr(value, "shape") else list(value)
    if not values:
        raise UserError("no images given")
    return values


def _picture(value: ImageLike, name: str) -> Picture:
    return picture_from_pil(value if isinstance(value, Image.Image) else _pil(value, name, (3, 4)), name)


def _mask(value: ImageLike, name: str) -> np.ndarray:
    return mask_from_pil(value if isinstance(value, Image.Image) else _pil(value, name, (1, 3)), name)


def _pil(array: np.ndarray, name: str, channels: tuple[int, ...]) -> Image.Image:
    """An array as a PIL image: uint8, bool, or floating point in [0, 1]."""
    if isinstance(array, str | Path) or array is None:
        raise UserError(f"{name}: {array!r} is no image; open files with PIL first")
    array = np.asarray(array)
    if not array.size:
        raise UserError(f"{name}: an array of shape {array.shape} has no pixels")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in channels):
        raise UserError(
            f"{name}: an array of shape {array.shape}; expected [H, W] or [H, W, C] with C in {channels} "
            "(for several images pass a list)"
        )
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise UserError(
                f"{name}: floating-point values from {array.min()} to {array.max()}; expected 0 to 1"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UserError(f"{name}: an array of {array.dtype}; expected uint8, or floating point in [0, 1]")
    return Image.fromarray(array)
