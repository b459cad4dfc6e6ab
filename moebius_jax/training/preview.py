"""Pictures of a run: what the network will see, and what it makes of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8
from PIL import Image

from moebius_jax.data.config import open_source
from moebius_jax.data.loader import Loader, Source
from moebius_jax.errors import UserError
from moebius_jax.imaging.grid import side_by_side
from moebius_jax.models import VAE, UNet
from moebius_jax.models.functional import Bare, Tensors
from moebius_jax.sampling.denoise import denoise, draw_noise, image_keys, start_latents
from moebius_jax.sampling.schedulers import SolverSteps, solver_steps
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.encode import latent_batch
from moebius_jax.training.networks import load_vae
from moebius_jax.training.sharding import replicated
from moebius_jax.training.step import LatentBatch

STRENGTH = 0.99


def preview_grid(source: Source, config: TrainConfig, mesh: Mesh) -> Image.Image:
    """The first samples of a run: image, hole, and the image with its hole grey.

    Raises:
        UserError: cached latents without a VAE to decode them.
    """
    batch = _first(source, config, config.seed)
    if "image" in batch:
        images, holes = batch["image"], batch["hole"]
    else:
        vae = load_vae(config, mesh)
        if vae is None:
            raise UserError("showing cached latents needs their decoder: pass vae=FOLDER")
        images = _to_images(vae, jnp.asarray(batch["moments"][..., :4], jnp.float32))
        holes = batch["hole"].repeat(vae.config.factor, 1).repeat(vae.config.factor, 2)
    masked = np.where(holes[..., None], np.uint8(128), images)
    return rows(images, holes.astype(np.uint8) * 255, masked)


class SampleGrids:
    """Inpaints the same few samples with the same noise, time after time.

    Without guidance: data without foreground samples never train the branch it would push away from.

    Args:
        config: of the run.
        mesh: every process draws the same samples, replicated over its devices.
        student: without arrays.
        vae: decodes (and encodes, where the data are images).
        source: of the training data, unless the configuration names other data for validation.
    """

    def __init__(
        self, config: TrainConfig, mesh: Mesh, student: Bare[UNet], vae: VAE, source: Source
    ) -> None:
        self._place = replicated(mesh)
        self._vae = vae
        self._latents = self._fixed_batch(config, source)
        self._steps = solver_steps("ddim", config.log.grid_steps, STRENGTH)
        self._inpaint = jax.jit(
            functools.partial(_inpaint, student, config.noise_offset), out_shardings=self._place
        )

    def draw(self, tensors: Tensors) -> Image.Image:
        """Image, masked image and result of each sample, for these tensors of the student."""
        result = self._inpaint(tensors, self._latents, self._steps)
        means = (self._latents.moments[..., :4], self._latents.masked_moments[..., :4], result)
        return rows(*(_to_images(self._vae, jnp.asarray(m, jnp.float32)) for m in means))

    def _fixed_batch(self, config: TrainConfig, source: Source) -> LatentBatch:
        if config.log.validation:
            data = dataclasses.replace(config.data, path=config.log.validation)
            source = open_source(data, config.student.latent_size)
        batch = _first(source, config, config.seed + 1)
        arrays = {name: jax.device_put(value, self._place) for name, value in batch.items()}
        return latent_batch(arrays, self._vae)


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
    student: Bare[UNet], noise_offset: float, tensors: Tensors, batch: LatentBatch, steps: SolverSteps
) -> Array:
    unet = student(tensors)
    unet.eval()
    keys = image_keys(jnp.stack([jnp.zeros_like(batch.index), batch.index], -1).astype(jnp.uint32))
    latents = batch.moments[..., :4].astype(jnp.float32)
    noise = draw_noise(keys, latents.shape[1:], jnp.float32(noise_offset))
    return denoise(
        lambda x, t, ids: unet(x, t, ids).sample,
        start_latents(latents, noise, steps),
        batch.hole.astype(jnp.float32)[..., None],
        batch.masked_moments[..., :4].astype(jnp.float32),
        steps,
        jnp.float32(1),
        guided=False,
    )


@jax.jit
def _decode(vae: VAE, latents: Array) -> Array:
    return jnp.round(jnp.clip(vae.decode(latents) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def _to_images(vae: VAE, latents: Array) -> UInt8[np.ndarray, "B H W 3"]:
    return np.asarray(_decode(vae, latents))


def _first(source: Source, config: TrainConfig, seed: int) -> dict[str, Any]:
    """A batch for a picture, without workers."""
    options = dataclasses.replace(config.data.loader, workers=0, threads=1, prefetch=1)
    return next(Loader(source, options, seed=seed, global_batch=config.log.grid_images))
