"""What a run has written for TensorBoard."""

from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

# What the release's trainer writes down of a step, but for the step itself and the running mean of the loss.
RELEASED_NAMES = {
    *("loss", "loss_task", "loss_outkd", "loss_featkd", "loss_elatentlpips", "lr", "grad_norm"),
    *("feat_gnorm_featkd", "feat_gnorm_task", "feat_gnorm_outkd", "feat_gnorm_elatentlpips"),
    *("out_gnorm_task", "out_gnorm_outkd", "out_gnorm_elatentlpips"),
    *("feat_weight_task", "out_weight_outkd", "out_weight_elatentlpips"),
}


def scalars(workdir: Path) -> dict[str, list[float]]:
    """Every scalar of a run by name, in the order it was written."""
    found: dict[str, list[float]] = {}
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found.setdefault(value.tag, []).append(float(make_ndarray(value.tensor)))
    return found
