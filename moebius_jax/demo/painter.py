"""What the page does with a photo: a preview to paint on, masks put together, results as files."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from moebius_jax.errors import UserError
from moebius_jax.imaging.masks import THRESHOLD
from moebius_jax.imaging.picture import Picture, read_mask, read_picture
from moebius_jax.inpaint.pipeline import MoebiusInpaintPipeline

PREVIEW = 1024  # pixels of the longer side of what is painted on
StepDone = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a visitor can set; see `MoebiusInpaintPipeline.__call__`.

    Attributes:
        guidance_scale: None is the model's own.
        steps, seed, mask_dilation, mask_blur: as there.
        results: pictures to choose from, with seeds `seed`, `seed + 1`, …
    """

    guidance_scale: float | None = None
    steps: int = 20
    seed: int = 0
    results: int = 1
    mask_dilation: int = 0
    mask_blur: float = 4.0


class Painter:
    """Inpaints for the page.

    Args:
        pipeline: of any model.
        max_megapixels: larger photos are refused.
        max_results: of one request.
    """

    def __init__(
        self, pipeline: MoebiusInpaintPipeline, *, max_megapixels: float = 40.0, max_results: int = 4
    ) -> None:
        self.pipeline = pipeline
        self.max_megapixels = max_megapixels
        self.max_results = max_results

    def open(self, path: str | Path) -> Picture:
        """The photo in a file.

        Raises:
            UserError: unreadable or too large; the message has the file's name, not its folder.
        """
        path = Path(path)
        with _without_folder(path):
            picture = read_picture(path)
        height, width = picture.rgb.shape[:2]
        if height * width > self.max_megapixels * 1e6:
            raise UserError(
                f"{path.name}: {width} x {height} pixels are {height * width / 1e6:.0f} megapixels; this "
                f"page takes {self.max_megapixels:g}"
            )
        return dataclasses.replace(picture, name=path.name)

    def preview(self, path: str | Path) -> Image.Image:
        """The photo as it is painted on: upright, its longer side at most `PREVIEW` pixels."""
        image = Image.fromarray(self.open(path).rgb)
        image.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
        return image

    def mask(
        self, picture: Picture, strokes: Bool[np.ndarray, "h w"] | None, file: str | Path | None
    ) -> UInt8[np.ndarray, "H W"]:
        """Strokes on the preview and an uploaded mask as one mask of the photo's size; white = repaint.

        Raises:
            UserError: nothing is marked, or the file is unreadable or of another shape than the photo.
        """
        height, width = picture.rgb.shape[:2]
        marked = np.zeros((height, width), bool)
        if strokes is not None and strokes.any():
            grey = Image.fromarray(strokes.astype(np.uint8) * 255)
            marked |= np.asarray(grey.resize((width, height), Image.Resampling.BILINEAR)) > THRESHOLD
        if file is not None:
            with _without_folder(Path(file)):
                grey = read_mask(Path(file))
            if grey.shape != marked.shape:
                raise UserError(
                    f"{Path(file).name}: the mask is {grey.shape[1]} x {grey.shape[0]} pixels and "
                    f"{picture.name} is {width} x {height}; they must agree"
                )
            marked |= grey > THRESHOLD
        if not marked.any():
            raise UserError("nothing is marked: paint over what should go, or upload a mask")
        return marked.astype(np.uint8) * 255

    def paint(
        self,
        picture: Picture,
        mask: UInt8[np.ndarray, "H W"],
        wishes: Wishes,
        on_step: StepDone = lambda *_: None,
    ) -> Iterator[Path]:
        """Results, each as soon as it is there, as PNG files of the photo's size and kind in a new folder.

        Raises:
            UserError: wishes out of range, or a result that failed.
        """
        if not 1 <= wishes.results <= self.max_results:
            raise UserError(f"results is {wishes.results}; expected 1 to {self.max_results}")
        folder = Path(tempfile.mkdtemp(prefix="moebius-"))
        image = picture.with_rgb(picture.rgb)
        done = 0

        def count(*_: object) -> dict[str, object]:
            nonlocal done
            done += 1
            on_step(done, wishes.steps)
            return {}

        for number in range(wishes.results):
            done = 0
            (result,) = self.pipeline(
                image,
                Image.fromarray(mask),
                num_inference_steps=wishes.steps,
                guidance_scale=wishes.guidance_scale,
                seed=wishes.seed + number,
                mask_dilation=wishes.mask_dilation,
                mask_blur=wishes.mask_blur,
                callback_on_step_end=count,
            ).images
            path = folder / f"{Path(picture.name).stem}_{wishes.seed + number}.png"
            result.save(path, **({"icc_profile": picture.icc_profile} if picture.icc_profile else {}))
            yield path


def strokes_of(layers: list[UInt8[np.ndarray, "h w 4"]]) -> Bool[np.ndarray, "h w"] | None:
    """Where anything is painted on an editor's transparent layers."""
    if not layers:
        return None
    return np.any([layer[..., 3] > THRESHOLD for layer in layers], axis=0)


@contextlib.contextmanager
def _without_folder(path: Path) -> Iterator[None]:
    """Errors inside name `path` without its folder: uploads lie in places a visitor need not know."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from None
