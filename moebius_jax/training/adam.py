"""Adam beside Muon, as the release computes it (docs/distillation.md, "Optimiser")."""

import jax
import jax.numpy as jnp
import optax
from optax import tree_utils


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam that adds `eps` to the root of the second moment before its bias is corrected.

    The update is m̂ / (√v̂ + eps/√(1 - b2ᵗ)): optax and PyTorch add eps itself. It differs where gradients
    are no larger than eps, above all in the first steps. The state is optax's.
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        return optax.scale_by_adam(b1, b2, eps).init(params)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = tree_utils.tree_update_moment(updates, state.mu, b1, 1)
        nu = tree_utils.tree_update_moment_per_elem_norm(updates, state.nu, b2, 2)
        correction = jnp.sqrt(1 - b2**count)
        moved = jax.tree.map(
            lambda m, v: correction * m / (jnp.sqrt(v) + eps),
            tree_utils.tree_bias_correction(mu, b1, count),
            nu,
        )
        return moved, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)
