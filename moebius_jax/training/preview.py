"""Pictures of a run: what the network will see, and what it makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8
from PIL import Image

from moebius_jax.data.datasets import Dataset
from moebius_jax.data.samples import Batch, PixelSample
from moebius_jax.diffusion.denoise import denoise, start_latents, unet_network
from moebius_jax.diffusion.draws import draw_noise, sample_keys
from moebius_jax.diffusion.solvers import SolverSteps, solver_steps
from moebius_jax.errors import UserError
from moebius_jax.imaging.grid import side_by_side
from moebius_jax.inpaint.latents import decode
from moebius_jax.models import VAE, UNet
from moebius_jax.sharding import plain_bools, replicated, with_mesh
from moebius_jax.training.batches import encoded
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.loading import first_batches
from moebius_jax.training.networks import load_image_codec
from moebius_jax.weights.tensors import Bare, Tensors


def preview_grid(dataset: Dataset, config: TrainConfig, mesh: Mesh) -> Image.Image:
    """The first samples of a run: image, hole, and what the network is shown of the image.

    Raises:
        UserError: cached latents without a VAE to decode them.
    """
    samples = _first(config, dataset, config.seed).samples
    if isinstance(samples, PixelSample):
        images, holes = samples.image, samples.hole
        visible = np.where(holes[..., None], np.uint8(128), images)
    else:
        vae = load_image_codec(config, mesh)
        if vae is None:
            raise UserError("showing cached latents needs their decoder: pass vae=FOLDER")
        images, visible = (_to_images(vae, _means(m)) for m in (samples.moments, samples.masked_moments))
        holes = samples.hole.repeat(vae.config.factor, 1).repeat(vae.config.factor, 2)
    return rows(images, holes.astype(np.uint8) * 255, visible)


class SampleGrids:
    """Inpaints the same few samples with the same noise, time after time, as the model is to be sampled.

    But without guidance: data without foreground samples never train the branch it would push away from.

    Args:
        config: of the run.
        mesh: every process draws the same samples, replicated over its devices.
        student: without arrays.
        vae: decodes (and encodes, where the data are images).
        dataset: held out, or the training data.
    """

    def __init__(
        self, config: TrainConfig, mesh: Mesh, student: Bare[UNet], vae: VAE, dataset: Dataset
    ) -> None:
        place = replicated(mesh)
        self._vae = vae
        batch = plain_bools(_first(config, dataset, config.seed + 1))
        self._batch = encoded(jax.device_put(batch, place), vae)
        steps = config.log.grid_steps or config.sampling.num_inference_steps
        self._steps = solver_steps(config.sampling.scheduler, steps, config.sampling.strength)
        inpaint = with_mesh(functools.partial(_inpaint, student, config.noise_offset), mesh)
        self._inpaint = jax.jit(inpaint, out_shardings=place)

    def draw(self, tensors: Tensors) -> Image.Image:
        """Image, masked image and result of each sample, for these tensors of the student."""
        result = self._inpaint(tensors, self._batch, self._steps)
        samples = self._batch.samples
        columns = (_means(samples.moments), _means(samples.masked_moments), result)
        return rows(*(_to_images(self._vae, latents) for latents in columns))


def rows(*columns: UInt8[np.ndarray, "..."]) -> Image.Image:
    """A picture with one row per sample and one column per array."""
    lines = [side_by_side(*panels) for panels in zip(*columns, strict=True)]
    picture = Image.new("RGB", (lines[0].width, sum(line.height + 8 for line in lines) - 8), "white")
    top = 0
    for line in lines:
        picture.paste(line, (0, top))
        top += line.height + 8
    return picture


def _inpaint(
    student: Bare[UNet], noise_offset: float, tensors: Tensors, batch: Batch, steps: SolverSteps
) -> Array:
    unet = student(tensors)
    unet.eval()
    samples = batch.samples
    latents = _means(samples.moments)
    keys = sample_keys(jnp.stack([jnp.zeros_like(batch.index), batch.index], -1).astype(jnp.uint32))
    noise = draw_noise(keys, latents.shape[1:], noise_offset)
    return denoise(
        unet_network(unet),
        start_latents(latents, noise, steps),
        samples.hole.astype(jnp.float32)[..., None],
        _means(samples.masked_moments),
        steps,
        jnp.float32(1),
        guided=False,
    )


def _means(moments: Array) -> Array:
    return jnp.split(jnp.asarray(moments, jnp.float32), 2, axis=-1)[0]


def _to_images(vae: VAE, latents: Array) -> UInt8[np.ndarray, "B H W 3"]:
    return np.asarray(decode(vae, latents)[0])


def _first(config: TrainConfig, dataset: Dataset, seed: int) -> Batch:
    """A batch for a picture, the same on every process."""
    size = config.log.grid_images
    return next(first_batches(config, dataset, seed=seed, size=size, count=1, is_shared=False))
