"""Image files: read into arrays without silent loss, written whole or not at all."""

import dataclasses
import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from moebius_jax.errors import UserError
from moebius_jax.files import replace_when_complete

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LOSSLESS = (".png", ".bmp", ".tif", ".tiff")
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """An 8-bit image as the models see it, and what is needed to write a result alike.

    Attributes:
        rgb: [H, W, 3], upright (EXIF orientation applied).
        alpha: [H, W] or None; passes through untouched.
        is_grey: whether the file had one colour channel; results are made grey again.
        icc_profile: colour profile to write back.
        name: for messages.
    """

    rgb: UInt8[np.ndarray, "H W 3"]
    alpha: UInt8[np.ndarray, "H W"] | None = None
    is_grey: bool = False
    icc_profile: bytes | None = None
    name: str = "image"

    def with_rgb(self, rgb: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
        """A PIL image of `rgb` in this picture's mode, with its alpha and profile."""
        image = Image.fromarray(np.ascontiguousarray(rgb))
        if self.is_grey:
            image = image.convert("L")
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        if self.icc_profile:
            image.info["icc_profile"] = self.icc_profile
        return image


def read_picture(path: Path) -> Picture:
    """Reads an image file.

    Raises:
        UserError: missing, not an image, truncated, or of a kind that cannot be kept exactly (16 bits a
            channel, floating point, CMYK).
    """
    return picture_from_pil(_open(path), str(path))


def picture_from_pil(image: Image.Image, name: str = "image") -> Picture:
    """A PIL image as a `Picture`; errors as for `read_picture`."""
    _require_8_bit(image, name)
    upright = ImageOps.exif_transpose(image)
    has_alpha = upright.mode in ("RGBA", "LA") or "transparency" in upright.info
    is_grey = upright.mode in ("L", "LA", "1")
    alpha = np.asarray(upright.convert("RGBA"))[..., 3] if has_alpha else None
    return Picture(
        rgb=np.asarray(upright.convert("RGBA").convert("RGB") if has_alpha else upright.convert("RGB")),
        alpha=alpha,
        is_grey=is_grey,
        icc_profile=image.info.get("icc_profile"),
        name=name,
    )


def read_mask(path: Path) -> UInt8[np.ndarray, "H W"]:
    """Reads a mask file as grey levels; white = repaint. Errors as for `read_picture`."""
    return mask_from_pil(_open(path), str(path))


def mask_from_pil(image: Image.Image, name: str = "mask") -> UInt8[np.ndarray, "H W"]:
    """A PIL image as grey levels, upright."""
    _require_8_bit(image, name)
    return np.asarray(ImageOps.exif_transpose(image).convert("L"))


def write_image(path: Path, image: Image.Image, *, overwrite: bool) -> None:
    """Writes an image in the format its suffix names; it appears under its name only when complete.

    Raises:
        UserError: the suffix names no known format, the format cannot hold the image, or the file exists.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)}, found {path.suffix or 'no suffix'}")
    if path.suffix.lower() in (".jpg", ".jpeg") and image.mode in ("RGBA", "LA"):
        raise UserError(f"{path}: JPEG has no transparency and the image does; choose .png")
    options = {} if path.suffix.lower() in LOSSLESS else {"quality": 95}
    if profile := image.info.get("icc_profile"):
        options["icc_profile"] = profile
    with replace_when_complete(path, overwrite=overwrite) as partial:
        image.save(partial, **options)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(path.read_bytes()))
        _require_8_bit(image, str(path))
        image.load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image PIL can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: unreadable image ({error})") from None
    return image


def _require_8_bit(image: Image.Image, name: str) -> None:
    # PIL opens 16-bit RGB files as "RGB" and drops the low bytes; until loaded, the raw data's tag tells.
    raw = " ".join(str(tile[3]) for tile in getattr(image, "tile", []))
    if image.mode not in _MODES or "16" in raw:
        found = f"16 bits a channel ({raw})" if "16" in raw else f"mode {image.mode}"
        raise UserError(f"{name}: {found}; expected 8-bit RGB, RGBA, grey or palette. Convert the file first")
