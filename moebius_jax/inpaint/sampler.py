"""A batch of square images through encoder, denoising loop and decoder, on every local device."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8
from pydantic import InstanceOf

from moebius_jax.diffusion.denoise import inpaint_latents, single_step, start_latents
from moebius_jax.diffusion.draws import Draw, draw_noise, draw_normal, sample_keys
from moebius_jax.diffusion.solvers import Solver, SolverSteps, solver_steps, timesteps
from moebius_jax.errors import UserError
from moebius_jax.inpaint.latents import Conditions, decode, encode
from moebius_jax.models import VAE, UNet, forms, inference_copy
from moebius_jax.schema import AtLeast0, Below1, checked
from moebius_jax.sharding import batch_sharding, make_mesh, plain_bools, replicated, with_mesh

# step index, timestep, latents → latents to go on with
StepCallback = Callable[[int, int, Array], Array]
LEAST_REFINE = 0.01  # less does nothing, at the length of a schedule


@checked
class SamplingOptions:
    """How a batch is denoised (names as in diffusers); a model's defaults are in its `pipeline.json`.

    Attributes:
        num_inference_steps: steps of the whole schedule.
        guidance_scale: s of ε_uncond + s·(ε_cond - ε_uncond); exactly 1 costs one pass instead of two.
        strength: the last int(steps · strength) steps are run.
        scheduler: "ddim", or "dpmpp_2m" for good results in fewer steps ("ddim_trailing" where it is the
            velocity that is predicted); or a `Solver` of one's own.
        noise_offset: weight of the per-channel constant in the noise.
        truncate: cut grey levels as the release does instead of rounding.
        refine: strength at which a large hole, which was painted small and enlarged, is painted again in
            tiles at the picture's own size; 0 leaves it enlarged (docs/inference.md, "Large holes").

    Raises:
        UserError: a value is out of range.
    """

    num_inference_steps: int = 20
    guidance_scale: AtLeast0 = 2.5
    strength: float = 0.99
    scheduler: str | InstanceOf[Solver] = "ddim"
    noise_offset: float = 0.0357
    truncate: bool = False
    refine: Below1 = 0.0

    def __post_init__(self) -> None:
        timesteps(self.scheduler, self.num_inference_steps, self.strength)
        if 0 < self.refine < LEAST_REFINE:
            raise UserError(f"refine is {self.refine}; expected 0, or {LEAST_REFINE} or more")

    @property
    def refining(self) -> "SamplingOptions":
        """For tiles, where `refine` is not 0: their `strength` is the smaller of the two.

        The schedule is as long as it was, or as long as it takes for one step to be left of it.
        """
        strength = min(self.refine, self.strength)
        steps = next(n for n in itertools.count(self.num_inference_steps) if int(n * strength) > 0)
        return self.changed(num_inference_steps=steps, strength=strength, refine=0.0)

    def changed(self, **values: Any) -> "SamplingOptions":
        """These options with some values changed; None changes nothing.

        Raises:
            UserError: a value is out of range.
        """
        return dataclasses.replace(self, **{name: x for name, x in values.items() if x is not None})


class Sampler:
    """Holds the network's weights on every device of a mesh and runs batches sharded over it.

    Args:
        unet, vae: with weights; the VAE computes in its own dtype.
        mesh: of this process's devices by default.

    Raises:
        UserError: the two are of different latents.
    """

    def __init__(self, unet: UNet, vae: VAE, mesh: Mesh | None = None) -> None:
        if unet.config.out_channels != vae.config.latent_channels:
            raise UserError(
                f"the U-Net's latents have {unet.config.out_channels} channels, the VAE's "
                f"{vae.config.latent_channels}; they must be of one kind"
            )
        self.mesh = mesh or make_mesh(jax.local_devices())
        self._graphdef, params = nnx.split(inference_copy(unet))
        self._params = jax.device_put(params, replicated(self.mesh))
        self._vae = jax.device_put(inference_copy(vae), replicated(self.mesh))
        self._encode, self._decode = (with_mesh(program, self.mesh) for program in (encode, decode))
        self._inpaint, self._step = (
            self._denoising(program, unet) for program in (inpaint_latents, single_step)
        )
        self.config = unet.config
        self.image_size = unet.config.latent_size * vae.config.factor

    def _denoising(self, program: Callable[..., Any], unet: UNet) -> Callable[..., Any]:
        program, platform = with_mesh(program, self.mesh), unet.config.platform  # `unet` itself is not kept
        if unet.precision.dtype != jnp.float32:
            return program

        @functools.wraps(program)
        def multiplied_in_float32(*args: Any, **kwargs: Any) -> Any:
            with jax.default_matmul_precision(forms.float32_products(platform)):
                return program(*args, **kwargs)

        return multiplied_in_float32

    def batch_size(self, wanted: int) -> int:
        """`wanted` rounded up to a multiple of the devices."""
        return -(-wanted // self.mesh.size) * self.mesh.size

    def __call__(
        self,
        images: UInt8[np.ndarray, "B S S 3"],
        holes: Bool[np.ndarray, "B S S"],
        seeds: Int[np.ndarray, "B 3"],
        options: SamplingOptions,
        callback: StepCallback | None = None,
        noise: Float[np.ndarray, "B h w c"] | None = None,
    ) -> tuple[UInt8[Array, "B S S 3"], Bool[Array, " B"]]:
        """Inpaints a batch; returns before the devices are done.

        Args:
            images, holes: of side `image_size`; B a multiple of the devices.
            seeds: what each item's random draws come from: seed, image index, window number.
            options: see `SamplingOptions`.
            callback: called after every step; runs the loop step by step.
            noise: to start from, instead of drawn.

        Returns:
            Images, and for each whether all its numbers were finite.
        """
        images, holes, seeds = jax.device_put(
            (images, plain_bools(holes), seeds.astype(np.uint32)), batch_sharding(self.mesh)
        )
        keys = sample_keys(seeds)
        shape = self.config.latent_shape
        conditions = self._encode(
            self._vae,
            images,
            holes,
            draw_normal(keys, Draw.IMAGE_POSTERIOR, shape),
            draw_normal(keys, Draw.MASKED_POSTERIOR, shape),
        )
        if noise is not None:
            noise = jax.device_put(noise.astype(np.float32), batch_sharding(self.mesh))
        latents = self.denoise(conditions, keys, options, callback, noise)
        return self._decode(self._vae, latents, truncate=options.truncate)

    def denoise(
        self,
        conditions: Conditions,
        keys: Array,
        options: SamplingOptions,
        callback: StepCallback | None = None,
        noise: Float[Array, "B h w c"] | None = None,
    ) -> Float[Array, "B h w 4"]:
        """The denoising loop on encoded images."""
        steps = solver_steps(options.scheduler, options.num_inference_steps, options.strength)
        arguments: dict[str, Any] = {
            "guidance_scale": jnp.float32(options.guidance_scale),
            "guided": options.guidance_scale != 1.0,
        }
        if callback is not None:
            if noise is None:
                noise = draw_noise(keys, self.config.latent_shape, jnp.float32(options.noise_offset))
            return self._step_by_step(conditions, noise, steps, callback, arguments)
        return self._inpaint(
            self._graphdef,
            self._params,
            conditions.image_latents,
            conditions.mask,
            conditions.masked_latents,
            keys,
            steps,
            noise_offset=jnp.float32(options.noise_offset),
            noise=noise,
            **arguments,
        )

    def _step_by_step(
        self,
        conditions: Conditions,
        noise: Array,
        steps: SolverSteps,
        callback: StepCallback,
        arguments: dict[str, Any],
    ) -> Float[Array, "B h w 4"]:
        latents = start_latents(conditions.image_latents, noise, steps)
        before = jnp.zeros_like(latents)
        for i in range(len(steps.timesteps)):
            latents, before = self._step(
                self._graphdef,
                self._params,
                latents,
                before,
                conditions.mask,
                conditions.masked_latents,
                steps.at_step(i),
                **arguments,
            )
            latents = callback(i, int(steps.timesteps[i]), latents)
        return latents
