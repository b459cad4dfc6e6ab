"""Solvers: which timesteps are run, and the coefficients of each step.

A solver is linear in the noisy latents x, the estimate x̂0 = (x - σ_t ε)/α_t and the estimate of the step
before:

    x ← a·x + b·((1 + c)·x̂0 - c·x̂0_before)

It is therefore a table of numbers per step (`SolverSteps`), worked out in float64, and the loop over them
does not know which solver it runs: another one compiles nothing. To add one: docs/extending.md.
"""

import dataclasses
import numbers
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from moebius_jax.diffusion.schedule import TRAIN_STEPS, alphas_cumprod
from moebius_jax.errors import UserError

Numbers = Float[np.ndarray, " S"]


@struct.dataclass
class SolverSteps:
    """What the loop needs for each of its S steps, in the order they are run; all [S].

    Attributes:
        timesteps: t the network is called at.
        alpha, sigma: α_t and σ_t.
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


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver of the formula above.

    Attributes:
        name: on the command line.
        most_steps: of a schedule.
    """

    name: ClassVar[str]
    most_steps: ClassVar[int] = TRAIN_STEPS

    def grid(self, n: int) -> Int[np.ndarray, " n"]:
        """The timesteps of a schedule of n steps, descending."""
        raise NotImplementedError

    def following(self, run: Int[np.ndarray, " S"], n: int) -> Numbers:
        """ᾱ after each of the steps that are run, the last of a schedule of n; here the next's, then 1."""
        del n
        return np.append(alphas_cumprod()[run[1:]], 1.0)

    def coefficients(
        self, alpha: Numbers, sigma: Numbers, alpha_next: Numbers, sigma_next: Numbers
    ) -> tuple[Numbers, Numbers, Numbers]:
        """a, b and c of every step, from α and σ before and after it."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DDIM(Solver):
    """First order, "leading" spacing, down to t = 0 and on to the clean latents."""

    name: ClassVar[str] = "ddim"

    def grid(self, n: int) -> Int[np.ndarray, " n"]:
        return np.arange(n)[::-1] * (TRAIN_STEPS // n)

    def following(self, run: Int[np.ndarray, " S"], n: int) -> Numbers:
        previous = run - TRAIN_STEPS // n
        return np.where(previous >= 0, alphas_cumprod()[np.maximum(previous, 0)], 1.0)

    def coefficients(
        self, alpha: Numbers, sigma: Numbers, alpha_next: Numbers, sigma_next: Numbers
    ) -> tuple[Numbers, Numbers, Numbers]:
        keep = sigma_next / sigma
        return keep, alpha_next - keep * alpha, np.zeros(len(alpha))


@dataclasses.dataclass(frozen=True)
class TrailingDDIM(DDIM):
    """DDIM with "trailing" spacing (Lin et al. 2024): however few steps there are, the first is at t = 999
    (at strength 1). For networks that predict the velocity; there ε says little of x̂0.
    """

    name: ClassVar[str] = "ddim_trailing"

    def grid(self, n: int) -> Int[np.ndarray, " n"]:
        return np.round(TRAIN_STEPS - np.arange(n) * TRAIN_STEPS / n).astype(int) - 1

    following = Solver.following


@dataclasses.dataclass(frozen=True)
class DPMSolverPP2M(DDIM):
    """DPM-Solver++(2M) of Lu et al. (2022): second order but in its first and last step.

    It goes from its last t > 0 straight to the clean latents and so puts its n steps on n + 1 intervals, as
    diffusers does.
    """

    name: ClassVar[str] = "dpmpp_2m"
    most_steps: ClassVar[int] = TRAIN_STEPS - 1

    def grid(self, n: int) -> Int[np.ndarray, " n"]:
        # diffusers counts the intervals from t = 0 to t = 999 + 1 and leaves t = 0 out.
        return np.arange(1, n + 1)[::-1] * (TRAIN_STEPS // (n + 1))

    following = Solver.following

    def coefficients(
        self, alpha: Numbers, sigma: Numbers, alpha_next: Numbers, sigma_next: Numbers
    ) -> tuple[Numbers, Numbers, Numbers]:
        """c = h/(2 h_before), h the step in log(α/σ), which is infinite in the last one."""
        keep, move, c = super().coefficients(alpha, sigma, alpha_next, sigma_next)
        inner = slice(1, len(c) - 1)
        log_ratio = np.log(alpha / sigma)
        h = np.log(alpha_next[:-1] / sigma_next[:-1]) - log_ratio[:-1]
        c[inner] = h[1:] / (2 * h[:-1])
        return keep, move, c


SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (DDIM(), TrailingDDIM(), DPMSolverPP2M())}


def find_solver(scheduler: str | Solver) -> Solver:
    """The solver of this name, or the given one.

    Raises:
        UserError: there is none of this name.
    """
    if isinstance(scheduler, Solver):
        return scheduler
    if scheduler not in SOLVERS:
        raise UserError(f"scheduler is {scheduler!r}; expected {' or '.join(SOLVERS)}")
    return SOLVERS[scheduler]


def timesteps(
    scheduler: str | Solver, num_inference_steps: int, strength: float = 1.0
) -> Int[np.ndarray, " S"]:
    """Timesteps that are run, descending.

    Args:
        scheduler: a key of `SOLVERS`, or a solver of one's own.
        num_inference_steps: steps of the whole schedule, 1 to the solver's `most_steps`.
        strength: the last int(steps · strength) of them are run.

    Raises:
        UserError: an argument is out of range, or no step is left.
    """
    solver = find_solver(scheduler)
    if (
        not isinstance(num_inference_steps, numbers.Integral)
        or not 1 <= num_inference_steps <= solver.most_steps
    ):
        raise UserError(f"num_inference_steps is {num_inference_steps}; expected 1 to {solver.most_steps}")
    if not isinstance(strength, numbers.Real) or not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; expected more than 0 and at most 1")
    kept = int(num_inference_steps * strength)
    if kept == 0:
        raise UserError(
            f"strength {strength} of {num_inference_steps} steps leaves none; raise one of the two"
        )
    return solver.grid(num_inference_steps)[num_inference_steps - kept :]


def solver_steps(scheduler: str | Solver, num_inference_steps: int, strength: float = 1.0) -> SolverSteps:
    """The table for one schedule; arguments and errors as for `timesteps`.

    The start is add_noise(latents, noise, first t) when strength < 1 and pure noise otherwise.
    """
    run, solver = timesteps(scheduler, num_inference_steps, strength), find_solver(scheduler)
    before, after = alphas_cumprod()[run], solver.following(run, num_inference_steps)
    alpha, sigma = np.sqrt(before), np.sqrt(1 - before)
    keep, move, lookback = solver.coefficients(alpha, sigma, np.sqrt(after), np.sqrt(1 - after))
    table = {
        "alpha": alpha,
        "sigma": sigma,
        "keep": keep,
        "move": move,
        "lookback": lookback,
        "start_alpha": alpha[0] if strength < 1 else 0.0,
        "start_sigma": sigma[0] if strength < 1 else 1.0,
    }
    return SolverSteps(
        timesteps=jnp.asarray(run, jnp.int32),
        **{name: jnp.asarray(value, jnp.float32) for name, value in table.items()},
    )
