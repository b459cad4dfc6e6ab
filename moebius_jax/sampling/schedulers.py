"""Noise schedule, timesteps and the coefficients of two solvers.

Both solvers are linear in the noisy latents x, the estimate x̂0 = (x - σ_t ε)/α_t and the estimate of the
step before:

    x ← a·x + b·((1 + c)·x̂0 - c·x̂0_before)

with α = √ᾱ, σ = √(1-ᾱ). DDIM has c = 0. A solver is therefore a table of numbers per step (`SolverSteps`),
worked out in float64, and the loop over them does not know which solver it runs.
"""

import numbers
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from moebius_jax.errors import UserError

Solver = Literal["ddim", "dpmpp_2m"]

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


@struct.dataclass
class SolverSteps:
    """What the loop needs for each of its S steps, in the order they are run; all [S].

    Attributes:
        timesteps: t the network is called at.
        alpha, sigma: √ᾱ_t and √(1-ᾱ_t).
        keep, move, lookback: a, b and c of the module's formula.
        start_alpha, start_sigma: scalars; the loop starts at start_alpha·latents + start_sigma·noise.
    """

    timesteps: Int[Array, " S"]
    alpha: Float[Array, " S"]
    sigma: Float[Array, " S"]
    keep: Float[Array, " S"]
    move: Float[Array, " S"]
    lookback: Float[Array, " S"]
    start_alpha: Float[Array, ""]
    start_sigma: Float[Array, ""]

    def repeated(self) -> "SolverSteps":
        """The table with its two scalars repeated, so that every leaf has a first axis of steps."""
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, self.timesteps.shape), self)

    def at_step(self, index: int) -> "SolverSteps":
        """The scalars of one step."""
        return jax.tree.map(lambda leaf: leaf[index], self.repeated())


def alphas_cumprod() -> np.ndarray:
    """ᾱ_t for t = 0…999 of the "scaled_linear" schedule, float64 (spec "Inference", step 6)."""
    betas = np.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS) ** 2
    return np.cumprod(1 - betas)


def timesteps(solver: Solver, num_inference_steps: int, strength: float = 1.0) -> np.ndarray:
    """Timesteps that are run, descending.

    "leading" spacing. DDIM's last is t = 0; DPM-Solver++ goes from its last, t > 0, straight to the clean
    latents and so puts its n steps on n + 1 intervals, as diffusers does.

    Args:
        solver: "ddim" or "dpmpp_2m".
        num_inference_steps: steps of the whole schedule, 1 to 1000 (999 for dpmpp_2m).
        strength: the last int(steps · strength) of them are run.

    Raises:
        UserError: an argument is out of range, or no step is left.
    """
    if solver not in get_args(Solver):
        raise UserError(f"scheduler is {solver!r}; expected {' or '.join(get_args(Solver))}")
    most = TRAIN_STEPS if solver == "ddim" else TRAIN_STEPS - 1
    if not isinstance(num_inference_steps, numbers.Integral) or not 1 <= num_inference_steps <= most:
        raise UserError(f"num_inference_steps is {num_inference_steps}; expected 1 to {most}")
    if not isinstance(strength, numbers.Real) or not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; expected more than 0 and at most 1")
    if solver == "ddim":
        grid = np.arange(num_inference_steps)[::-1] * (TRAIN_STEPS // num_inference_steps)
    else:
        # diffusers counts the intervals from t = 0 to t = 999 + 1 and leaves t = 0 out.
        grid = np.arange(1, num_inference_steps + 1)[::-1] * (TRAIN_STEPS // (num_inference_steps + 1))
    kept = int(num_inference_steps * strength)
    if kept == 0:
        raise UserError(
            f"strength {strength} of {num_inference_steps} steps leaves none; raise one of the two"
        )
    return grid[len(grid) - kept :]


def solver_steps(solver: Solver, num_inference_steps: int, strength: float = 1.0) -> SolverSteps:
    """The table for one schedule; arguments and errors as for `timesteps`.

    The start is add_noise(latents, noise, first t) when strength < 1 and pure noise otherwise.
    """
    run = timesteps(solver, num_inference_steps, strength)
    ᾱ = alphas_cumprod()
    if solver == "ddim":
        previous = run - TRAIN_STEPS // num_inference_steps
        ᾱ_next = np.where(previous >= 0, ᾱ[np.maximum(previous, 0)], 1.0)
    else:
        ᾱ_next = np.append(ᾱ[run[1:]], 1.0)
    alpha, sigma = np.sqrt(ᾱ[run]), np.sqrt(1 - ᾱ[run])
    alpha_next, sigma_next = np.sqrt(ᾱ_next), np.sqrt(1 - ᾱ_next)
    keep = sigma_next / sigma
    table = {
        "alpha": alpha,
        "sigma": sigma,
        "keep": keep,
        "move": alpha_next - keep * alpha,
        "lookback": np.zeros(len(run))
        if solver == "ddim"
        else _second_order(alpha / sigma, alpha_next, sigma_next),
        "start_alpha": alpha[0] if strength < 1 else 0.0,
        "start_sigma": sigma[0] if strength < 1 else 1.0,
    }
    return SolverSteps(
        timesteps=jnp.asarray(run, jnp.int32),
        **{name: jnp.asarray(value, jnp.float32) for name, value in table.items()},
    )


def _second_order(ratio: np.ndarray, alpha_next: np.ndarray, sigma_next: np.ndarray) -> np.ndarray:
    """c = h/(2 h_before) of DPM-Solver++(2M), h the step in log(α/σ); first order at both ends.

    The last step ends at σ = 0, where h is infinite.
    """
    c = np.zeros(len(ratio))
    inner = slice(1, len(ratio) - 1)
    log_ratio = np.log(ratio)
    h = np.log(alpha_next[:-1] / sigma_next[:-1]) - log_ratio[:-1]
    c[inner] = h[1:] / (2 * h[:-1])
    return c
