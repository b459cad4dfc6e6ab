"""A step's figures under the names they are logged by: the release's trainer's, so that curves compare."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from moebius_jax.distillation.gradients import Balanced
from moebius_jax.distillation.loss import Loss

Metrics = dict[str, Float[Array, ""]]

_NORMS = {"theta_f": "out_gnorm", "theta_c": "feat_gnorm"}
_CROSS = "feat_weight_task"  # W_C: the release makes it with the task loss, and weighs all of L_out by it
# Names of before, logged too until version 0.2 is out.
_FORMER = {
    "grad_norm": "gradient_norm",
    "lr": "learning_rate",
    _CROSS: "weight_cross",
    "out_weight_": "weight_",
    "out_gnorm_": "grad_norm_theta_f_",
    "feat_gnorm_": "grad_norm_theta_c_",
}


def balance_metrics(balanced: Balanced, losses: Sequence[Loss]) -> Metrics:
    """Losses, weights and norms: `loss`, `loss_task`, `out_weight_outkd`, `out_gnorm_task`, …

    A norm that the release has no name for is that of all output losses together, `feat_gnorm_output`.
    """
    names = {loss.name: loss.logged_as for loss in losses}
    short = {name: logged.removeprefix("loss_") for name, logged in names.items()}
    metrics = {names.get(name, "loss"): value for name, value in balanced.losses.items()}
    for name, value in balanced.weights.items():
        metrics[_CROSS if name == "cross" else f"out_weight_{short[name]}"] = value
    for path, value in balanced.norms.items():
        where, name = path.split("/")
        metrics[f"{_NORMS[where]}_{short.get(name, name)}"] = value
    return metrics


def with_former_names(metrics: dict[str, float]) -> dict[str, float]:
    """The figures, and those that were renamed under their former names as well."""
    former = {}
    for name, value in metrics.items():
        for now, before in _FORMER.items():
            if name == now or (now.endswith("_") and name.startswith(now)):
                former[before + name.removeprefix(now)] = value
    return metrics | former


def first_bad_metric(metrics: Metrics) -> str | None:
    """Name of the first loss that is not finite, the total last; or of the gradients' or parameters' norm.

    A step's losses are those before its update; the parameters' norm tells of what it made of them.

    Of metrics on the host: asking the devices would wait for the step they have begun since.
    """
    losses = [name for name in metrics if name.startswith("loss_")]
    for name in (*losses, "loss", "grad_norm", "parameter_norm"):
        if name in metrics and not np.isfinite(metrics[name]):
            return name
    return None
