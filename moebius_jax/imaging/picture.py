"""Image files: read into arrays without silent loss, written whole or not at all."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from moebius_jax.buckets import is_bucket, reaching, write_object
from moebius_jax.errors import UserError
from moebius_jax.files import replace_when_complete

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MASK_ENDINGS = ("_mask", "-mask")  # a mask's file is named as its image's, or that and one of these
# By content, whatever the name says: some formats PIL knows are read by starting other programs (PostScript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
KEEPS_ALPHA = (".png", ".webp", ".tif", ".tiff")
LARGEST_FILE = 2**31  # bytes
_LONGEST_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}  # pixels, of formats and their library
# EXIF's program that wrote a picture, and what the picture is.
_SOFTWARE, _DESCRIPTION, _OURS = 0x0131, 0x010E, "moebius-jax"
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
        """A PIL image of `rgb` in this picture's mode, with its alpha and profile.

        An `rgb` of another size, a release-style square, stays plain: there is no alpha for its pixels.
        """
        image = Image.fromarray(np.ascontiguousarray(rgb))
        if rgb.shape != self.rgb.shape:
            return image
        if self.is_grey:
            image = image.convert("L")
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        if self.icc_profile:
            image.info["icc_profile"] = self.icc_profile
        return image


def open_image(file: Path | BinaryIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    """A file as PIL opens it, undecoded. No picture is opened elsewhere, so none can start a program."""
    return Image.open(file, formats=formats)


def read_picture(path: Path, *, max_megapixels: float | None = None) -> Picture:
    """Reads an image file.

    Args:
        path: of the file.
        max_megapixels: larger pictures are refused before they are decoded.

    Raises:
        UserError: missing, not an image, truncated, too large, or of a kind that cannot be kept exactly (16
            bits a channel, floating point, CMYK).
    """
    return picture_from_pil(_open(path, max_megapixels), str(path))


def picture_from_pil(image: Image.Image, name: str = "image") -> Picture:
    """A PIL image as a `Picture`; errors as for `read_picture`."""
    _require_8_bit(image, name)
    with _decoding(name):
        upright = ImageOps.exif_transpose(image)
        has_alpha = _has_alpha(upright)
        is_grey = upright.mode in ("L", "LA", "1")
        alpha = np.asarray(upright.convert("RGBA"))[..., 3] if has_alpha else None
        rgb = np.asarray(upright.convert("RGBA").convert("RGB") if has_alpha else upright.convert("RGB"))
    if not rgb.size:
        raise UserError(f"{name}: an image of {rgb.shape[1]} x {rgb.shape[0]} pixels")
    return Picture(
        rgb=rgb,
        alpha=alpha,
        is_grey=is_grey,
        icc_profile=image.info.get("icc_profile"),
        name=name,
    )


def read_mask(path: Path, *, max_megapixels: float | None = None) -> UInt8[np.ndarray, "H W"]:
    """Reads a mask file as grey levels; white = repaint. Arguments and errors as for `read_picture`."""
    return mask_from_pil(_open(path, max_megapixels), str(path))


def mask_from_pil(image: Image.Image, name: str = "mask") -> UInt8[np.ndarray, "H W"]:
    """A PIL image as grey levels, upright."""
    _require_8_bit(image, name)
    with _decoding(name):
        upright = ImageOps.exif_transpose(image)
        if _has_alpha(upright) and np.asarray(upright.convert("RGBA"))[..., 3].min(initial=255) < 255:
            raise UserError(f"{name}: a mask with transparency is ambiguous; flatten it to black and white")
        return np.asarray(upright.convert("L"))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA") or "transparency" in image.info


def write_image(
    path: Path, image: Image.Image, *, overwrite: bool, mark: str | None = None, only_ours: bool = True
) -> None:
    """Writes an image in the format its suffix names; it appears under its name only when complete.

    Args:
        path: to write, here or in a bucket.
        image: to be written.
        overwrite: replace a picture of ours.
        mark: text that `mark_of` finds again.
        only_ours: replace no other.

    It bears our name in its EXIF data. BMP has none: any is taken for ours.

    Raises:
        UserError: the suffix names no known format, the format cannot hold the image, or the file exists and
            may not be replaced.
    """
    if overwrite and only_ours:
        require_replaceable(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)}, found {path.suffix or 'no suffix'}")
    if image.mode in ("RGBA", "LA"):
        require_alpha_format(path)
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 95}, ".jpeg": {"quality": 95}}.get(
        path.suffix.lower(), {}
    )
    if profile := image.info.get("icc_profile"):
        options["icc_profile"] = profile
    require_fitting_format(path, image.size)
    if path.suffix.lower() != ".bmp":
        options["exif"] = Image.Exif()
        options["exif"][_SOFTWARE] = _OURS
        if mark:
            options["exif"][_DESCRIPTION] = mark
    if is_bucket(path):  # where objects have their names only when all of them is there
        content = io.BytesIO()
        with _encoding(path):
            image.save(content, format=Image.registered_extensions()[path.suffix.lower()], **options)
        write_object(path, content.getvalue(), overwrite=overwrite)
        return
    with replace_when_complete(path, overwrite=overwrite) as partial, _encoding(path):
        image.save(partial, **options)


def is_result(path: Path) -> bool:
    """Whether there is a picture, whole as far as its format can tell without being decoded."""
    try:
        if not path.is_file() or not path.stat().st_size:
            return False
        with open_image(path) as image:
            image.verify()
    except Exception:  # whatever PIL's readers raise of half a picture
        return False
    return True


def mark_of(path: Path) -> str | None:
    """What `write_image` was given as the picture's mark."""
    try:
        with open_image(path) as image:
            return image.getexif().get(_DESCRIPTION)
    except Exception:  # half a picture, or none
        return None


def require_replaceable(path: Path) -> None:
    """Raises UserError if there is something else than a picture of ours."""
    with reaching(path):
        is_foreign = path.exists() and not is_ours(path)
    if is_foreign:
        raise UserError(
            f"{path}: not replaced, it is no picture we wrote (version 0.1 did not mark them); remove it, or "
            "choose another name"
        )


def is_ours(path: Path) -> bool:
    """Whether we wrote it; also what is empty, as after a full disk, and any BMP, which cannot say."""
    file: Path | io.BytesIO = path
    if is_bucket(path):
        with reaching(path):
            file = io.BytesIO(path.read_bytes())
    try:
        if not (len(file.getbuffer()) if is_bucket(path) else path.stat().st_size):
            return path.is_file()
        with open_image(file) as image:
            return image.format == "BMP" or image.getexif().get(_SOFTWARE) == _OURS
    except Exception:  # half a picture, or none
        return False


def require_fitting_format(path: Path, size: tuple[int, int]) -> None:
    """Raises UserError if the format `path` names has no room for so many pixels."""
    if max(size) > (longest := _LONGEST_SIDE.get(path.suffix.lower(), math.inf)):
        raise UserError(
            f"{path}: {size[0]} x {size[1]} pixels; {path.suffix} has room for {longest} a side, choose .png"
        )


def require_alpha_format(path: Path) -> None:
    """Raises UserError if the format `path` names has no transparency."""
    if path.suffix.lower() not in KEEPS_ALPHA:
        raise UserError(f"{path}: {path.suffix} keeps no transparency and the image has some; choose .png")


def _open(path: Path, max_megapixels: float | None) -> Image.Image:
    try:
        image = open_image(io.BytesIO(_bytes_of(path)))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image of a kind that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # PIL's readers raise whatever their formats lead to
        raise UserError(f"{path}: unreadable image ({error})") from None
    if max_megapixels is not None and image.width * image.height > max_megapixels * 1e6:
        raise UserError(
            f"{path}: {image.width} x {image.height} pixels are {image.width * image.height / 1e6:.0f} "
            f"megapixels; expected at most {max_megapixels:g}"
        )
    _require_8_bit(image, str(path))
    with _decoding(str(path)):
        frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # telephones store a preview as the second frame of an MPO
        raise UserError(f"{path}: holds {frames} frames or pages; expected one image")
    return image


def _bytes_of(path: Path) -> bytes:
    if is_bucket(path):  # where all there is are files
        return path.read_bytes()
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: no ordinary file")  # a pipe or a device may never end
    if (length := path.stat().st_size) > LARGEST_FILE:
        raise UserError(f"{path}: {length:,} bytes; expected {LARGEST_FILE:,} or fewer")
    return path.read_bytes()


@contextlib.contextmanager
def _encoding(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # encoders' own limits
        raise UserError(f"{path}: cannot be written ({error})") from None


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """PIL decodes late and raises what its decoders raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: unreadable image ({error})") from None


def _require_8_bit(image: Image.Image, name: str) -> None:
    # PIL opens 16-bit RGB files as "RGB" and drops the low bytes; until loaded, the raw data's tag tells.
    arguments = [tile[3] for tile in getattr(image, "tile", [])]
    raw = " ".join(str(a if isinstance(a, str) else a[0]) for a in arguments if a)
    is_deep = ";16" in raw or image.mode.startswith("I")
    if image.mode not in _MODES or is_deep:
        found = f"16 bits a channel or more ({raw or image.mode})" if is_deep else f"mode {image.mode}"
        raise UserError(f"{name}: {found}; expected 8-bit RGB, RGBA, grey or palette. Convert the file first")
