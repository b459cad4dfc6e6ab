"""What a training step draws at random, and the noisy latents it makes of it."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from moebius_jax.diffusion.draws import Draw, draw_noise, draw_normal
from moebius_jax.diffusion.prediction import clean_of, target_of
from moebius_jax.diffusion.schedule import TRAIN_STEPS, add_noise, levels
from moebius_jax.models.config import PredictionType
from moebius_jax.schema import expecting

_Timesteps = Annotated[tuple[Annotated[int, Field(ge=0, lt=TRAIN_STEPS)], ...], Field(min_length=1)]
TimestepSampling = Annotated[
    Literal["logit_normal", "uniform"] | _Timesteps,
    expecting(f"logit_normal, uniform, or timesteps below {TRAIN_STEPS}"),
]


@struct.dataclass
class Noised:
    """One noised batch (docs/distillation.md, "One step").

    Attributes:
        noisy_latents: z_t = α_t z + σ_t n.
        noise: n.
        timesteps: t.
        prediction_type: what the networks that are called with it predict.
    """

    noisy_latents: Float[Array, "B h w c"]
    noise: Float[Array, "B h w c"]
    timesteps: Int[Array, " B"]
    prediction_type: PredictionType = struct.field(pytree_node=False, default="epsilon")

    @property
    def target(self) -> Float[Array, "B h w c"]:
        """What a network should predict: the noise, or the velocity."""
        return target_of(self.prediction_type, self.noisy_latents, self.noise, *levels(self.timesteps))

    def clean(self, prediction: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """x̂0, the clean latents that a prediction amounts to."""
        return clean_of(self.prediction_type, prediction, self.noisy_latents, *levels(self.timesteps))


def draw_timesteps(keys: Key[Array, " B"], sampling: TimestepSampling) -> Int[Array, " B"]:
    """t in [0, 1000): floor(1000 · sigmoid(N(0, 1))) as the released configuration, any, or one of a list."""
    if sampling != "logit_normal":
        listed = jnp.arange(TRAIN_STEPS) if sampling == "uniform" else jnp.asarray(sampling, jnp.int32)
        return listed[_uniform(keys, len(listed))]
    fraction = jax.nn.sigmoid(draw_normal(keys, Draw.TIMESTEP, ()))
    return jnp.minimum(jnp.floor(TRAIN_STEPS * fraction), TRAIN_STEPS - 1).astype(jnp.int32)


def _uniform(keys: Key[Array, " B"], end: int) -> Int[Array, " B"]:
    def draw(key: Key[Array, ""]) -> Int[Array, ""]:
        return jax.random.randint(jax.random.fold_in(key, Draw.TIMESTEP), (), 0, end)

    return jax.vmap(draw)(keys)


def noise_batch(
    keys: Key[Array, " B"],
    latents: Float[Array, "B h w c"],
    *,
    noise_offset: float,
    sampling: TimestepSampling,
    prediction_type: PredictionType = "epsilon",
) -> Noised:
    """Draws noise (with `noise_offset` times one normal number per channel) and timesteps, and adds them."""
    noise = draw_noise(keys, latents.shape[1:], noise_offset)
    timesteps = draw_timesteps(keys, sampling)
    return Noised(
        noisy_latents=add_noise(latents, noise, timesteps),
        noise=noise,
        timesteps=timesteps,
        prediction_type=prediction_type,
    )
