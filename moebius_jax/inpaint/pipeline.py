"""`MoebiusInpaintPipeline`: weights from a folder or the Hub, pictures in, pictures out."""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh
from jax.typing import ArrayLike
from PIL import Image

from moebius_jax.defaults import DTYPES
from moebius_jax.diffusion.solvers import Solver
from moebius_jax.errors import UserError
from moebius_jax.files import require_local
from moebius_jax.imaging.picture import Picture
from moebius_jax.inpaint import model_folder
from moebius_jax.inpaint.items import ImageLike, make_items, with_noise
from moebius_jax.inpaint.model_folder import find_model, write_model_folder
from moebius_jax.inpaint.sampler import Sampler, SamplingOptions
from moebius_jax.inpaint.stream import InpaintOptions, Mode, inpaint_stream
from moebius_jax.models import VAE, UNet, UNetConfig, VAEConfig
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.precision import auto_dtype, auto_vae_dtype
from moebius_jax.sharding import make_mesh, replicated
from moebius_jax.weights.hub import Track, push, with_owner
from moebius_jax.weights.load import load_unet, load_vae, save_network

StepEnd = Callable[["MoebiusInpaintPipeline", int, int, dict[str, Any]], dict[str, Any]]

MAX_BATCH = 8  # unless asked for more; one 512 px image needs about 1 GB beside the weights


@dataclasses.dataclass(frozen=True)
class InpaintOutput:
    """Results in the order of the images.

    Attributes:
        images: PIL images or uint8 arrays, by `output_type`, with the channels of the input.
    """

    images: list[Image.Image] | list[np.ndarray]


class MoebiusInpaintPipeline:
    """Inpaints images with a U-Net and a VAE, on all local devices.

    Args:
        unet: in full, not folded; it is also what `save_pretrained` writes.
        vae: the autoencoder, computing in its own dtype.
        defaults: for calls.
        variant: the released weights these are, where that is known; for reports.
        mesh: of this process's devices by default.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        *,
        defaults: SamplingOptions | None = None,
        variant: str | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.unet = unet
        self.vae = vae
        self.defaults = defaults or SamplingOptions()
        self.variant = variant
        self.sampler = Sampler(unet, vae, mesh)

    @property
    def guidance_scale(self) -> float:
        """The default's; to change it: `pipe.defaults = pipe.defaults.changed(guidance_scale=…)`."""
        return self.defaults.guidance_scale

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        variant: str | None = None,
        vae: str | Path | None = None,
        revision: str | None = None,
        dtype: Dtype = "auto",
        stream_dtype: Dtype | None = None,
        vae_dtype: Dtype = "auto",
        cache_dir: str | Path | None = None,
        mesh: Mesh | None = None,
        verify: bool = True,
        track: Track = lambda items, **_: items,
    ) -> "MoebiusInpaintPipeline":
        """Loads a pipeline.

        Args:
            path_or_hub_id: a folder (from `save_pretrained`, a converted U-Net, or a converted copy of the
                Hub's layout), a Hub repository, "hustvl/Moebius", or "tiny", the small network that comes
                with the package (docs/tiny.md).
            variant: "pretrained" (default), "ft_places2", "ft_celebahq" or "ft_ffhq".
            vae: folder of a converted VAE; by default the one beside the U-Net, or hustvl/PixelHacker's.
            revision: branch, tag or commit of the Hub's repository; by default the released one
                (`weights.hub.PINNED`), elsewhere "main".
            dtype: compute dtype of the U-Net; "auto" is float16 on GPUs, bfloat16 on TPUs, float32 on CPUs.
            stream_dtype: of what lies between its large products; by default `dtype` (docs/inference.md).
            vae_dtype: compute dtype of the VAE; "auto" is float16 on GPUs, float32 elsewhere.
            cache_dir: where converted downloads are kept.
            mesh: see the class.
            verify: compare the weights' files with their checksums first.
            track: wraps the converter's loop over tensors, as tqdm does.

        Raises:
            UserError: nothing usable there, or not reachable.
        """
        mesh = mesh or make_mesh(jax.local_devices())
        found = find_model(
            path_or_hub_id, variant=variant, vae=vae, revision=revision, cache_dir=cache_dir, track=track
        )
        both = {"placement": replicated(mesh), "verify": verify}
        return cls(
            load_unet(found.unet, **both, **_dtypes(dtype, stream_dtype)),
            load_vae(found.vae, **both, dtype=_vae_dtype(vae_dtype)),
            defaults=found.sampling,
            variant=found.variant,
            mesh=mesh,
        )

    @classmethod
    def untrained(
        cls,
        unet_config: UNetConfig | None = None,
        vae_config: VAEConfig | None = None,
        *,
        seed: int = 0,
        dtype: Dtype = "auto",
        stream_dtype: Dtype | None = None,
        vae_dtype: Dtype = "auto",
        mesh: Mesh | None = None,
    ) -> "MoebiusInpaintPipeline":
        """The full-size network (or the given sizes) with seeded random weights: to try the machinery out."""
        config = unet_config or UNetConfig.student()

        # Not jitted: a program of a thousand small random arrays takes longer to compile than to run.
        unet = UNet(config, rngs=KeyStream(jax.random.key(seed)), **_dtypes(dtype, stream_dtype))
        unet.eval()
        rngs = KeyStream(jax.random.key(seed))
        vae = VAE(vae_config or VAEConfig(), dtype=_vae_dtype(vae_dtype), rngs=rngs)
        return cls(unet, vae, mesh=mesh)

    def save_pretrained(
        self, folder: str | Path, *, overwrite: bool = False, license: str | None = None
    ) -> None:
        """Writes a folder `from_pretrained` reads, with a model card; it appears only when complete.

        Args:
            folder: to make.
            overwrite: replace an existing one.
            license: of the weights, an identifier the Hub knows, for the card.

        Raises:
            UserError: the folder exists or cannot be written.
        """
        try:
            require_local(str(folder))
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from None
        self._save(Path(folder), overwrite=overwrite, license=license)

    def _save(
        self, folder: Path, *, license: str | None, overwrite: bool = False, known_as: str | None = None
    ) -> None:
        options = {"overwrite": overwrite, "license": license, "known_as": known_as}
        with write_model_folder(folder, sampling=self.defaults, **options) as partial:
            save_network(partial / model_folder.UNET, self.unet)
            save_network(partial / model_folder.VAE, self.vae)

    def push_to_hub(self, repository: str, *, private: bool | None = None, license: str | None = None) -> str:
        """Uploads the model; `from_pretrained(repository)` loads it anywhere.

        Args:
            repository: "owner/name"; made where there is none.
            private: of a new repository; None is the owner's default.
            license: see `save_pretrained`.

        Returns:
            The repository's address.

        Raises:
            UserError: not logged in, not allowed, or not reachable.
        """
        if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]*\w[\w.-]*", repository):
            raise UserError(f"{repository!r}: expected a repository's name, such as owner/name")
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / repository.rpartition("/")[2]
            self._save(saved, license=license, known_as=with_owner(repository))
            return push(saved, repository, private=private)

    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask_image: ImageLike | Sequence[ImageLike],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        strength: float | None = None,
        seed: int | Sequence[int] = 0,
        image_indices: Sequence[int] | None = None,
        latents: ArrayLike | None = None,
        scheduler: str | Solver | None = None,
        noise_offset: float | None = None,
        refine: float | None = None,
        mode: Mode = "crop",
        invert_mask: bool = False,
        mask_dilation: int = 0,
        mask_blur: float | None = None,
        padding_mask_crop: int | None = None,
        match_color: bool | None = None,
        paste: bool = True,
        batch_size: int | None = None,
        output_type: Literal["pil", "np"] = "pil",
        callback_on_step_end: StepEnd | None = None,
    ) -> InpaintOutput:
        """Inpaints one image or a list.

        Args:
            image: PIL images, or arrays [H, W], [H, W, 3] or [H, W, 4], uint8 or float in [0, 1]; any sizes.
            mask_image: white = repaint, of its image's size; one may serve all images.
            num_inference_steps, guidance_scale, strength, scheduler, noise_offset, refine: see
                `SamplingOptions`; what is None is as the model's `defaults` have it.
            seed: one for all images, or one each. An image's random numbers depend on its seed and index
                only, not on what else is in the batch. At equal `batch_size` the result is equal to the bit;
                another may round differently by one grey level.
            image_indices: each image's index; by default its position when one seed serves all, else 0. To
                repeat image i of a list alone, pass the same seed and `image_indices=[i]`.
            latents: the noise to start from instead of drawing it, [h, w, c] for all images or [N, h, w, c],
                of the network's latent size; PyTorch's [N, c, h, w] is `noise.permute(0, 2, 3, 1)` of that.
                No noise offset is added. An image's hole must fit one square.
            mode, invert_mask, mask_dilation, mask_blur, padding_mask_crop, match_color, paste: see
                `InpaintOptions`.
            batch_size: squares per compiled batch; by default as many as there are images, at most 8.
            output_type: "pil" images in the input's mode, or "np" uint8 arrays.
            callback_on_step_end: called as callback(pipe, step, timestep, {"latents": …}) after every step of
                every batch; may return a dictionary with other latents. Slower: the loop then runs step by
                step.

        Returns:
            An object with `.images`.

        Raises:
            UserError: arguments that do not fit together, or an image that failed; names it.
        """
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected 1 or more")
        if output_type not in ("pil", "np"):
            raise UserError(f"output_type is {output_type!r}; expected 'pil' or 'np'")
        options = InpaintOptions(
            mode=mode,
            invert_mask=invert_mask,
            mask_dilation=mask_dilation,
            mask_blur=mask_blur,
            padding_mask_crop=padding_mask_crop,
            match_color=match_color,
            paste=paste,
        )
        sampling = self.defaults.changed(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            strength=strength,
            scheduler=scheduler,
            noise_offset=noise_offset,
            refine=refine,
            truncate=mode == "release",
        )
        items = make_items(image, mask_image, seed, image_indices)
        if latents is not None:
            items = with_noise(items, np.asarray(latents, np.float32), self.unet.config.latent_shape)
        stream = inpaint_stream(
            self.sampler,
            items,
            options,
            sampling,
            batch_size=self.sampler.batch_size(batch_size or min(len(items), MAX_BATCH)),
            callback=_step_callback(self, callback_on_step_end),
        )
        images = []
        for result in stream:
            if result.error:
                raise result.error
            picture: Picture = result.item.tag
            pil = picture.with_rgb(result.rgb)
            images.append(pil if output_type == "pil" else np.asarray(pil))
        return InpaintOutput(images=images)


def _step_callback(pipe: MoebiusInpaintPipeline, callback: StepEnd | None) -> Any:
    if callback is None:
        return None

    def on_step(index: int, timestep: int, latents: jax.Array) -> jax.Array:
        returned = callback(pipe, index, timestep, {"latents": latents})
        return (returned or {}).get("latents", latents)

    return on_step


def _dtypes(dtype: Dtype, stream_dtype: Dtype | None) -> dict[str, Dtype]:
    dtype = _known("dtype", dtype, auto=auto_dtype)
    return {
        "dtype": dtype,
        "stream_dtype": dtype if stream_dtype is None else _known("stream_dtype", stream_dtype),
    }


def _vae_dtype(dtype: Dtype) -> Dtype:
    return _known("vae_dtype", dtype, auto=auto_vae_dtype)


def _known(name: str, dtype: Dtype, *, auto: Callable[[], Dtype] | None = None) -> Dtype:
    """`dtype`, or what "auto" stands for where there is such a choice."""
    if auto is not None and isinstance(dtype, str) and dtype == "auto":
        return auto()
    try:
        if jnp.dtype(dtype).name in DTYPES:
            return jnp.dtype(dtype)
    except TypeError:
        pass
    choices = f"{'' if auto is None else 'auto, '}float32, float16 or bfloat16"
    raise UserError(f"{name} is {dtype!r}; expected {choices}")
