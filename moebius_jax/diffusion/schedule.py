"""The noise schedule the networks were trained with: z_t = α_t z + σ_t n, α = √ᾱ, σ = √(1-ᾱ)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def alphas_cumprod() -> Float[np.ndarray, " 1000"]:
    """ᾱ_t for t = 0…999 of the "scaled_linear" schedule, float64 (docs/inference.md, "Schedule")."""
    betas = np.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS) ** 2
    return np.cumprod(1 - betas)


def add_noise(
    latents: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], timesteps: Int[Array, " B"]
) -> Float[Array, "B h w c"]:
    """z_t = α_t z + σ_t n."""
    alpha, sigma = levels(timesteps)
    return alpha * latents + sigma * noise


def levels(timesteps: Int[Array, " B"]) -> tuple[Float[Array, "B 1 1 1"], Float[Array, "B 1 1 1"]]:
    """α_t and σ_t."""
    bars = jnp.asarray(alphas_cumprod(), jnp.float32)[timesteps][:, None, None, None]
    return jnp.sqrt(bars), jnp.sqrt(1 - bars)
