"""`MoebiusInpaintPipeline`: weights from a folder or the Hub, pictures in, pictures out."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from moebius_jax import checkpoints
from moebius_jax.conversion import hub
from moebius_jax.errors import UserError
from moebius_jax.files import replace_when_complete
from moebius_jax.imaging.picture import Picture, mask_from_pil, picture_from_pil
from moebius_jax.inpaint import InpaintOptions, Item, Mode, inpaint_stream
from moebius_jax.models import VAE, UNet, UNetConfig, VAEConfig
from moebius_jax.models import vae as vae_model
from moebius_jax.models.initializers import KeyStream
from moebius_jax.sampling.sampler import Sampler, SamplingOptions, data_mesh
from moebius_jax.sampling.schedulers import Solver

ImageLike = Image.Image | np.ndarray
Track = hub.Track
StepEnd = Callable[["MoebiusInpaintPipeline", int, int, dict[str, Any]], dict[str, Any]]

DEFAULT_GUIDANCE = 2.5  # natural scenes (paper, Table 6)
PORTRAIT_GUIDANCE = 2.0
PORTRAIT_VARIANTS = ("ft_celebahq", "ft_ffhq")
MAX_BATCH = 8  # unless asked for more; one 512 px image needs about 1 GB beside the weights
PIPELINE_FILE = "pipeline.json"


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
        guidance_scale: default for calls.
        mesh: devices, with an axis `data`; this process's own by default.
    """

    def __init__(
        self, unet: UNet, vae: VAE, *, guidance_scale: float = DEFAULT_GUIDANCE, mesh: Mesh | None = None
    ) -> None:
        self.unet = unet
        self.vae = vae
        self.guidance_scale = guidance_scale
        self.sampler = Sampler(unet, vae, mesh)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        variant: str | None = None,
        vae: str | Path | None = None,
        dtype: Dtype = jnp.float32,
        vae_dtype: Dtype = jnp.float32,
        cache_dir: str | Path | None = None,
        mesh: Mesh | None = None,
        track: Track = lambda items, **_: items,
    ) -> "MoebiusInpaintPipeline":
        """Loads a pipeline.

        Args:
            path_or_hub_id: a folder (from `save_pretrained`, a converted U-Net, or a converted copy of the
                Hub's layout) or a Hub repository, "hustvl/Moebius".
            variant: "pretrained" (default), "ft_places2", "ft_celebahq" or "ft_ffhq".
            vae: folder of a converted VAE; by default the one beside the U-Net, or hustvl/PixelHacker's.
            dtype: compute dtype of the U-Net; bfloat16 is the fast choice on GPUs and TPUs.
            vae_dtype: compute dtype of the VAE.
            cache_dir: where converted downloads are kept.
            mesh: see the class.
            track: wraps the converter's loop over tensors, as tqdm does.

        Raises:
            UserError: nothing usable there, or not reachable.
        """
        mesh = mesh or data_mesh()
        place = NamedSharding(mesh, PartitionSpec())
        found = _locate(path_or_hub_id, variant, vae, cache_dir, track)
        return cls(
            checkpoints.load_unet(found.unet, dtype=dtype, placement=place),
            checkpoints.load_vae(found.vae, dtype=vae_dtype, placement=place),
            guidance_scale=found.guidance_scale,
            mesh=mesh,
        )

    @classmethod
    def untrained(
        cls,
        unet_config: UNetConfig | None = None,
        vae_config: VAEConfig | None = None,
        *,
        seed: int = 0,
        dtype: Dtype = jnp.float32,
        vae_dtype: Dtype = jnp.float32,
        mesh: Mesh | None = None,
    ) -> "MoebiusInpaintPipeline":
        """The full-size network (or the given sizes) with seeded random weights: to try the machinery out."""
        config = unet_config or UNetConfig.student()

        # Not jitted: a program of a thousand small random arrays takes longer to compile than to run.
        unet = UNet(config, dtype=dtype, rngs=KeyStream(jax.random.key(seed)))
        unet.eval()
        sizes = vae_config or VAEConfig()
        init = jax.jit(vae_model.init_params, static_argnums=0)
        vae = VAE(params=init(sizes, jax.random.key(seed)), config=sizes, dtype=vae_dtype)
        return cls(unet, vae, mesh=mesh)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes a folder `from_pretrained` reads; it appears under its name only when complete."""
        ours = (PIPELINE_FILE, "unet", "vae")
        with replace_when_complete(Path(folder), overwrite=overwrite, ours=ours) as partial:
            partial.mkdir()
            checkpoints.save_unet(partial / "unet", self.unet)
            checkpoints.save_vae(partial / "vae", self.vae)
            (partial / PIPELINE_FILE).write_text(json.dumps({"guidance_scale": self.guidance_scale}) + "\n")

    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask_image: ImageLike | Sequence[ImageLike],
        *,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        strength: float = 0.99,
        seed: int | Sequence[int] = 0,
        image_indices: Sequence[int] | None = None,
        scheduler: Solver = "ddim",
        noise_offset: float = 0.0357,
        mode: Mode = "crop",
        invert_mask: bool = False,
        mask_dilation: int = 0,
        mask_blur: float = 4.0,
        padding_mask_crop: int | None = None,
        match_color: bool = False,
        paste: bool = True,
        batch_size: int | None = None,
        output_type: Literal["pil", "np"] = "pil",
        callback_on_step_end: StepEnd | None = None,
    ) -> InpaintOutput:
        """Inpaints one image or a list.

        Args:
            image: PIL images, or arrays [H, W], [H, W, 3] or [H, W, 4], uint8 or float in [0, 1]; any sizes.
            mask_image: white = repaint, of its image's size; one may serve all images.
            num_inference_steps, guidance_scale, strength, scheduler, noise_offset: see `SamplingOptions`;
                the guidance default is the checkpoint's.
            seed: one for all images, or one each. An image's random numbers depend on its seed and index
                only, not on what else is in the batch. At equal `batch_size` the result is equal to the bit;
                another may round differently by one grey level.
            image_indices: each image's index; by default its position when one seed serves all, else 0. To
                repeat image i of a list alone, pass the same seed and `image_indices=[i]`.
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
        sampling = SamplingOptions(
            num_inference_steps=num_inference_steps,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            strength=strength,
            scheduler=scheduler,
            noise_offset=noise_offset,
            truncate=mode == "release",
        )
        items = _items(image, mask_image, seed, image_indices)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Located:
    unet: Path
    vae: Path
    guidance_scale: float


def _locate(
    path_or_hub_id: str | Path,
    variant: str | None,
    vae: str | Path | None,
    cache_dir: str | Path | None,
    track: Track,
) -> _Located:
    """Folders of the U-Net and the VAE, fetched and converted where need be."""
    folder = Path(path_or_hub_id)
    cache = Path(cache_dir) if cache_dir else None
    guidance = PORTRAIT_GUIDANCE if variant in PORTRAIT_VARIANTS else DEFAULT_GUIDANCE
    if not folder.exists():
        unet = hub.fetch(str(path_or_hub_id), variant or "pretrained", cache, track)
        found_vae = Path(vae) if vae else hub.fetch(hub.VAE_REPOSITORY, "vae", cache, track)
        return _Located(unet=unet, vae=found_vae, guidance_scale=guidance)
    if (folder / PIPELINE_FILE).is_file():
        if variant:
            raise UserError(f"{folder}: a saved pipeline holds one model; leave out variant={variant!r}")
        return _Located(
            unet=folder / "unet", vae=Path(vae or folder / "vae"), guidance_scale=_saved_guidance(folder)
        )
    if (folder / "config.json").is_file():
        if variant:
            raise UserError(f"{folder}: is one converted U-Net; leave out variant={variant!r}")
        recorded = checkpoints.read_config(folder).source.get("variant")
        guidance = PORTRAIT_GUIDANCE if recorded in PORTRAIT_VARIANTS else DEFAULT_GUIDANCE
        unet, beside = folder, folder.parent / "vae"
    else:
        unet, beside = folder / (variant or "pretrained"), folder / "vae"
        if not unet.is_dir():
            raise UserError(
                f"{folder}: holds neither a pipeline ({PIPELINE_FILE}), nor a converted U-Net (config.json), "
                f"nor the variant {unet.name}/"
            )
    if vae is None and not beside.is_dir():
        raise UserError(f"{folder}: no VAE beside it ({beside}); name a converted one with vae= or --vae")
    return _Located(unet=unet, vae=Path(vae or beside), guidance_scale=guidance)


def _saved_guidance(folder: Path) -> float:
    try:
        return float(json.loads((folder / PIPELINE_FILE).read_text())["guidance_scale"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / PIPELINE_FILE}: damaged ({error})") from None


def _items(
    image: ImageLike | Sequence[ImageLike],
    mask_image: ImageLike | Sequence[ImageLike],
    seed: int | Sequence[int],
    image_indices: Sequence[int] | None,
) -> list[Item]:
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


def _step_callback(pipe: MoebiusInpaintPipeline, callback: StepEnd | None) -> Any:
    if callback is None:
        return None

    def on_step(index: int, timestep: int, latents: jax.Array) -> jax.Array:
        returned = callback(pipe, index, timestep, {"latents": latents})
        return (returned or {}).get("latents", latents)

    return on_step
