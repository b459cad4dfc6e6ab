"""What a run has written for TensorBoard."""

from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray


def scalars(workdir: Path) -> dict[str, list[float]]:
    """Every scalar of a run by name, in the order it was written."""
    found: dict[str, list[float]] = {}
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found.setdefault(value.tag, []).append(float(make_ndarray(value.tensor)))
    return found
