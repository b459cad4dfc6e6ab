"""How losses are weighed against each other by their gradient norms: paper, release, or not at all."""

from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp

from moebius_jax.distillation.loss import Scalar

BalanceForm = Literal["paper", "release", "static"]

_FLOOR = 1e-30  # keeps a vanished gradient from making NaN; no norm that matters is near


def output_weights(form: BalanceForm, norms: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """W of every loss of the predicted noise (paper, Eq 4).

    Args:
        form: of the balance.
        norms: L2 norm of each one's gradient at θ_F, the anchor's first.
    """
    anchor, *others = norms
    weights = {anchor: jnp.float32(1)}
    for name in others:
        weights[name] = _ratio(form, norms[anchor], norms[name], offset=1e-6, limit=1e6)
    return weights


def cross_weight(form: BalanceForm, bottleneck_norm: Scalar, output_norm: Scalar) -> Scalar:
    """W_C (paper, Eq 5).

    Args:
        form: of the balance.
        bottleneck_norm: L2 norm of L_C's gradient at θ_C.
        output_norm: that of L_out's (paper) or of the anchor's (release).
    """
    return _ratio(form, bottleneck_norm, output_norm, offset=1e-4, limit=1e4)


def _ratio(form: BalanceForm, above: Scalar, below: Scalar, *, offset: float, limit: float) -> Scalar:
    if form == "static":
        return jnp.float32(1)
    if form == "release":
        return jnp.clip(above / (below + offset), 0, limit)
    return jnp.square(above) / jnp.maximum(jnp.square(below), _FLOOR)
