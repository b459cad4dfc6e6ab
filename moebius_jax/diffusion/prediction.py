"""What a network's output means: the noise n, or the velocity v = α_t n - σ_t z of Salimans and Ho (2022).

At the end of the schedule z_t is all but noise. There an error in n is divided by α = 0.07 in the clean
latents that are read from it, while v is (but for its sign) those clean latents: what a hole's colours are is
learnt far sooner. The released networks predict n.
"""

from jaxtyping import Array, Float

from moebius_jax.models.config import PredictionType

Latents = Float[Array, "B h w c"]
Level = Float[Array, "..."]  # α_t or σ_t: a scalar, or [B, 1, 1, 1]


def target_of(
    kind: PredictionType, noisy_latents: Latents, noise: Latents, alpha: Level, sigma: Level
) -> Latents:
    """What a network of this kind should have said: n, or v = α n - σ z = (n - σ z_t)/α."""
    return noise if kind == "epsilon" else (noise - sigma * noisy_latents) / alpha


def noise_of(
    kind: PredictionType, output: Latents, noisy_latents: Latents, alpha: Level, sigma: Level
) -> Latents:
    """The noise that an output amounts to: itself, or n = α v + σ z_t."""
    return output if kind == "epsilon" else alpha * output + sigma * noisy_latents


def clean_of(
    kind: PredictionType, output: Latents, noisy_latents: Latents, alpha: Level, sigma: Level
) -> Latents:
    """The clean latents x̂0 that an output amounts to: (z_t - σ n)/α, or α z_t - σ v."""
    if kind == "epsilon":
        return (noisy_latents - sigma * output) / alpha
    return alpha * noisy_latents - sigma * output
