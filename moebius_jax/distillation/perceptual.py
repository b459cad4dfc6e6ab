"""E-LatentLPIPS as a loss: input scaling, random transform, network, and the plain difference."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moebius_jax.distillation.blitting import draw_transform, inverse_map, transform
from moebius_jax.distillation.loss import Context, Loss, Scalar
from moebius_jax.models import ELatentLPIPS, ELatentLPIPSConfig
from moebius_jax.models.architecture import Architecture
from moebius_jax.schema import Location, checked

SDXL_SCALE = 0.13025


@checked
class Perceptual(Loss):
    """L_P: distance of the clean latents the student predicts from those its target amounts to.

    Attributes:
        rescale_inputs: multiply both inputs by 0.13025 first, although the latents are scaled already. The
            release does (its `normalize=True`); the paper says nothing of it.
        augment: send both inputs through the same random transform.
    """

    name: ClassVar[str] = "perceptual"
    logged_as: ClassVar[str] = "loss_elatentlpips"
    release_scale: ClassVar[float] = 0.5
    NETWORK: ClassVar[type[Architecture] | None] = ELatentLPIPSConfig

    network: Location | ELatentLPIPSConfig | None = None
    rescale_inputs: bool = False
    augment: bool = True

    def require_network(self) -> None:
        if self.network is None:
            raise ValueError(
                "the perceptual loss needs E-LatentLPIPS weights, which are CC-BY-NC and not ours to bundle: "
                "convert them (convert_weights.py) and pass loss.perceptual.network=FOLDER, or train "
                "without: loss.terms=coarse,fine,task"
            )

    def __call__(self, prediction: Array, context: Context) -> Scalar:
        predicted, clean = context.noised.clean(prediction), context.noised.clean(context.noised.target)
        return self.distance(context.network, predicted, clean, context.keys).mean()

    def distance(
        self,
        network: ELatentLPIPS,
        a: Float[Array, "B S S c"],
        b: Float[Array, "B S S c"],
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, " B"]:
        """The distance of each pair of scaled latents (docs/distillation.md, "E-LatentLPIPS").

        Args:
            network: with its weights.
            a, b: latents.
            keys: one per pair, for the transform.

        Raises:
            ValueError: the transform is wanted and there are no keys.
        """
        if self.rescale_inputs:
            a, b = a * SDXL_SCALE, b * SDXL_SCALE
        plain = jnp.abs(a - b).mean((1, 2, 3))
        if self.augment:
            if keys is None:
                raise ValueError("the random transform needs keys")
            inverse = inverse_map(draw_transform(keys), a.shape[1])
            a, b = transform(a, inverse), transform(b, inverse)
        return network(a, b).sum(0) + plain
