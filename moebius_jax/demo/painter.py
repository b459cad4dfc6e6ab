"""What the page does with a photo: a preview to paint on, masks put together, results as files."""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from moebius_jax.diffusion.solvers import timesteps
from moebius_jax.errors import UserError, first_line
from moebius_jax.imaging.masks import THRESHOLD
from moebius_jax.imaging.picture import Picture, open_image, read_mask, read_picture
from moebius_jax.inpaint.pipeline import MoebiusInpaintPipeline

PREVIEW = 1024  # pixels of the longer side of what is painted on
MAX_LAYERS = 4
StepDone = Callable[[int, int | None], None]  # done, of so many; None: beyond those of one square


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a visitor can set; see `MoebiusInpaintPipeline.__call__`.

    Attributes:
        guidance_scale, steps, refine: None is the model's own.
        seed, mask_dilation, mask_blur: as there.
        results: pictures to choose from, with seeds `seed`, `seed + 1`, …
    """

    guidance_scale: float | None = None
    steps: int | None = None
    seed: int = 0
    results: int = 1
    mask_dilation: int = 0
    mask_blur: float = 0.0
    refine: float | None = None


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
            picture = read_picture(path, max_megapixels=self.max_megapixels)
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
                grey = read_mask(Path(file), max_megapixels=self.max_megapixels)
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
        """Results, each as soon as it is there, as PNG files of the photo's size and kind.

        A file is gone when the next one is asked for: whoever wants to keep it copies it.

        Raises:
            UserError: wishes out of range, or a result that failed.
        """
        if not 1 <= wishes.results <= self.max_results:
            raise UserError(f"results is {wishes.results}; expected 1 to {self.max_results}")
        image = picture.with_rgb(picture.rgb)
        sampling = self.pipeline.defaults.changed(num_inference_steps=wishes.steps)
        total = len(timesteps(sampling.scheduler, sampling.num_inference_steps, sampling.strength))

        def count(*_: object) -> dict[str, object]:
            nonlocal done
            done += 1
            if done <= total:
                on_step(done, total)
            else:
                on_step(done - total, None)
            return {}

        for number in range(wishes.results):
            done = 0
            seed = (wishes.seed + number) % 2**32
            (result,) = self.pipeline(
                image,
                Image.fromarray(mask),
                num_inference_steps=wishes.steps,
                guidance_scale=wishes.guidance_scale,
                seed=seed,
                mask_dilation=wishes.mask_dilation,
                mask_blur=wishes.mask_blur,
                refine=wishes.refine,
                callback_on_step_end=count,
            ).images
            with tempfile.TemporaryDirectory(prefix="moebius-") as folder:
                path = Path(folder) / f"{Path(picture.name).stem}_{seed}.png"
                result.save(path, **({"icc_profile": picture.icc_profile} if picture.icc_profile else {}))
                yield path


def strokes_of(layers: list[bytes]) -> Bool[np.ndarray, "h w"] | None:
    """Where anything is painted on an editor's transparent layers, PNG or WebP files of one size.

    Raises:
        UserError: anything else.
    """
    alphas = [_alpha(layer) for layer in layers]
    if not alphas:
        return None
    if len({alpha.shape for alpha in alphas}) > 1 or len(alphas) > MAX_LAYERS:
        raise UserError(f"strokes: {len(alphas)} layers; expected at most {MAX_LAYERS}, of one size")
    return np.any([alpha > THRESHOLD for alpha in alphas], axis=0)


def _alpha(layer: bytes) -> UInt8[np.ndarray, "h w"]:
    try:
        image = open_image(io.BytesIO(layer), ("PNG", "WEBP"))
        if max(image.size) > PREVIEW:
            raise UserError(f"strokes: a layer of {image.width} x {image.height}; expected at most {PREVIEW}")
        return np.asarray(image.convert("RGBA"))[..., 3]
    except UserError:
        raise
    except Exception as error:  # PIL's readers raise whatever their formats lead to
        raise UserError(f"strokes: a layer is no picture ({first_line(error)})") from None


@contextlib.contextmanager
def _without_folder(path: Path) -> Iterator[None]:
    """Errors inside name `path` without its folder: uploads lie in places a visitor need not know."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from None
