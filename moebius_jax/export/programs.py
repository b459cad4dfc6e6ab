"""What is exported: encoder, denoising step and decoder as functions of arrays alone."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moebius_jax.diffusion.denoise import denoise_once, unet_network
from moebius_jax.diffusion.solvers import SolverSteps
from moebius_jax.models import VAE, UNet, inference_copy
from moebius_jax.weights.tensors import abstract_network, fill, network_tensors

COEFFICIENTS = ("alpha", "sigma", "keep", "move", "lookback")  # of a step, in this order


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # jax.jit wants a hash
class Program:
    """One function, and what it takes and gives; "B" in a shape is the batch.

    Attributes:
        name: of its files.
        graphdef, weights: of the network it runs, as `nnx.split` has them.
        function: of the network, then of the inputs in order.
        inputs: name → (shape, dtype).
        outputs: name → shape; all float32.
    """

    name: str
    graphdef: nnx.GraphDef
    weights: nnx.State
    function: Callable[..., Any]
    inputs: Mapping[str, tuple[tuple[int | str, ...], str]]
    outputs: Mapping[str, tuple[int | str, ...]]

    def __call__(self, weights: nnx.State, *inputs: Array) -> Any:
        return self.function(nnx.merge(self.graphdef, weights), *inputs)

    def arguments(self, batch: Any) -> list[jax.ShapeDtypeStruct]:
        """The inputs' shapes at a batch, a number or a symbolic dimension."""
        return [
            jax.ShapeDtypeStruct(tuple(batch if n == "B" else n for n in shape), jnp.dtype(dtype))
            for shape, dtype in self.inputs.values()
        ]


def programs(unet: UNet, vae: VAE, *, guided: bool) -> list[Program]:
    """The three programs of a model.

    Args:
        unet, vae: in full, not folded, computing in the dtypes the programs shall compute in.
        guided: whether a step runs both branches; without, its guidance scale must be one.
    """
    size, latents = unet.config.latent_size * vae.config.factor, unet.config.latent_shape
    image, small, mask = ("B", size, size, 3), ("B", *latents), ("B", *latents[:2], 1)

    def encode(vae: VAE, images: Float[Array, "B S S 3"]) -> tuple[Array, Array]:
        posterior = vae.posterior(images)
        return vae.scaled(posterior.mean), vae.scaled(posterior.std)

    def step(
        unet: UNet,
        latents: Float[Array, "B h w c"],
        before: Float[Array, "B h w c"],
        mask: Float[Array, "B h w 1"],
        masked_latents: Float[Array, "B h w c"],
        timestep: Int[Array, " 1"],
        coefficients: Float[Array, " 5"],
        guidance_scale: Float[Array, " 1"],
    ) -> tuple[Array, Array]:
        numbers = {name: coefficients[i] for i, name in enumerate(COEFFICIENTS)}
        now = SolverSteps(timesteps=timestep[0], start_alpha=0.0, start_sigma=0.0, **numbers)
        network = unet_network(unet)
        return denoise_once(
            network, latents, before, mask, masked_latents, now, guidance_scale[0], guided=guided
        )

    def decode(vae: VAE, latents: Float[Array, "B h w c"]) -> Array:
        return vae.decode(latents)

    precision = {"dtype": unet.precision.dtype, "stream_dtype": unet.precision.stream_dtype}
    unet, vae = _portable(unet, **precision), _portable(vae, dtype=vae.dtype)
    (unet_def, unet_weights), (vae_def, vae_weights) = (
        nnx.split(inference_copy(network)) for network in (unet, vae)
    )
    whole_vae = {"graphdef": vae_def, "weights": vae_weights}
    return [
        Program(
            name="encoder",
            function=encode,
            inputs={"images": (image, "float32")},
            outputs={"mean": small, "std": small},
            **whole_vae,
        ),
        Program(
            name="step",
            graphdef=unet_def,
            weights=unet_weights,
            function=step,
            inputs={
                "latents": (small, "float32"),
                "before": (small, "float32"),
                "mask": (mask, "float32"),
                "masked_latents": (small, "float32"),
                "timestep": ((1,), "int32"),
                "coefficients": ((len(COEFFICIENTS),), "float32"),
                "guidance_scale": ((1,), "float32"),
            },
            outputs={"new_latents": small, "clean": small},
        ),
        Program(
            name="decoder",
            function=decode,
            inputs={"latents": (small, "float32")},
            outputs={"images": image},
            **whole_vae,
        ),
    ]


def _portable(network: Any, **dtypes: Any) -> Any:
    """The network in the forms that run anywhere, whatever this machine is."""
    config = network.config.replace(platform="portable")
    made = fill(abstract_network(config, **dtypes), network_tensors(network))
    made.eval()
    return made
