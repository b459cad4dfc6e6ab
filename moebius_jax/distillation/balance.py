"""How the loss terms are weighed against each other: paper, release, or fixed numbers."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

Term = Literal["coarse", "fine", "task", "perceptual"]
BalanceForm = Literal["paper", "release", "static"]
Scalar = Float[Array, ""]

OUTPUT_TERMS: tuple[Term, ...] = ("task", "fine", "perceptual")  # those that look at the predicted noise
_SCALES = {
    "paper": {"coarse": 1.0, "fine": 1.0, "task": 1.0, "perceptual": 1.0},
    "release": {"coarse": 0.01, "fine": 0.01, "task": 0.5, "perceptual": 0.5},
    "static": {"coarse": 1.0, "fine": 1.0, "task": 1.0, "perceptual": 1.0},
}
_FLOOR = 1e-30  # keeps a vanished gradient from making NaN; no norm that matters is near


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which losses are trained on, and how they are balanced.

    The total is s_C·L_C + W_C·L_out with L_out = s_T·L_T + s_F·W_F·L_F + s_P·W_P·L_P.

    The first of task, fine, perceptual that is present is the *anchor*: its weight is one, and the others
    are brought to its gradient norm (in the paper the anchor is always the task loss; without it, as in
    Table 5's row 2, there is no other choice). A term that is absent costs nothing.

    Attributes:
        terms: of coarse, fine, task, perceptual.
        balance: "paper" (Eqs 4, 5: ratios of squared norms), "release" (ratios of norms, clipped), or
            "static" (W = 1, only the scales below).
        coarse_scale, fine_scale, task_scale, perceptual_scale: the s; None is the form's own: 1, and in the
            release 0.01, 0.01, 0.5, 0.5.

    Raises:
        ValueError: a field is out of range.
    """

    terms: tuple[Term, ...] = ("coarse", "fine", "task", "perceptual")
    balance: BalanceForm = "paper"
    coarse_scale: float | None = None
    fine_scale: float | None = None
    task_scale: float | None = None
    perceptual_scale: float | None = None

    def __post_init__(self) -> None:
        known = get_args(Term)
        if not self.terms or len(set(self.terms)) < len(self.terms) or set(self.terms) - set(known):
            raise ValueError(f"terms is {self.terms!r}; expected some of {', '.join(known)}, each once")
        if self.balance not in get_args(BalanceForm):
            raise ValueError(
                f"balance is {self.balance!r}; expected one of {', '.join(get_args(BalanceForm))}"
            )
        for term in known:
            value = getattr(self, f"{term}_scale")
            if value is not None and not value > 0:
                raise ValueError(
                    f"{term}_scale is {value}; expected a number above 0 (or leave the term out)"
                )

    @property
    def needs_teacher(self) -> bool:
        return "coarse" in self.terms or "fine" in self.terms

    @property
    def output_terms(self) -> tuple[Term, ...]:
        """Those present that look at the predicted noise, the anchor first."""
        return tuple(t for t in OUTPUT_TERMS if t in self.terms)

    def scale(self, term: Term) -> float:
        """s of a term."""
        value = getattr(self, f"{term}_scale")
        return _SCALES[self.balance][term] if value is None else value


def output_weights(config: LossConfig, norms: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """W of every term that looks at the predicted noise.

    Args:
        config: which terms and which form.
        norms: L2 norm of each one's gradient at θ_F (Eq 4).
    """
    anchor, *others = config.output_terms
    weights = {anchor: jnp.float32(1)}
    for term in others:
        weights[term] = _ratio(config.balance, norms[anchor], norms[term], offset=1e-6, limit=1e6)
    return weights


def cross_weight(config: LossConfig, coarse_norm: Scalar, output_norm: Scalar) -> Scalar:
    """W_C (Eq 5).

    Args:
        config: the form.
        coarse_norm: L2 norm of L_C's gradient at θ_C.
        output_norm: that of L_out's (paper) or of the anchor's (release).
    """
    return _ratio(config.balance, coarse_norm, output_norm, offset=1e-4, limit=1e4)


def _ratio(form: BalanceForm, above: Scalar, below: Scalar, *, offset: float, limit: float) -> Scalar:
    if form == "static":
        return jnp.float32(1)
    if form == "release":
        return jnp.clip(above / (below + offset), 0, limit)
    return jnp.square(above) / jnp.maximum(jnp.square(below), _FLOOR)
