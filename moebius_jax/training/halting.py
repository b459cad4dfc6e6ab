"""A process that has no batch to give: the step it meets changes nothing, and all end after it.

A step is one program of all processes and waits for each. A process whose data cannot be read therefore takes
part with a stand-in, marked by its samples' numbers. The step keeps the state as it was, and its figures tell
all processes at once whose stand-in it was, so that they can save together.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moebius_jax.company import told_by
from moebius_jax.data.datasets import Dataset
from moebius_jax.data.samples import Batch
from moebius_jax.errors import SharedError
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.metrics import Metrics

HALTED_BY = "halted_by"  # a step's figure: 0, or the number of a process, from 1


def stand_in(dataset: Dataset, config: TrainConfig) -> Batch:
    """This process's share of a batch that holds nothing."""
    size = config.batch_size // jax.process_count()
    number = np.full(size, -1 - jax.process_index(), np.int32)
    return Batch(
        samples=jax.tree.map(lambda x: np.broadcast_to(x, (size, *np.shape(x))).copy(), dataset.blank),
        index=number,
    )


def halted_by(index: Int[Array, " B"]) -> Int[Array, ""]:
    """0 for a batch that is whole, else 1 + the process that had none."""
    return jnp.maximum(0, -jnp.min(index))


def unless_halted(halted: Int[Array, ""], new: Any, old: Any) -> Any:
    """`new` after a whole batch, else `old`: trees of the same arrays."""
    return jax.tree.map(lambda x, y: jnp.where(halted > 0, y, x), new, old)


def halt(metrics: Metrics, error: Exception | None) -> SharedError | None:
    """What ends the run after a step with these figures, if anything does.

    Args:
        metrics: of the step, on the host.
        error: this process's own, if it gave the stand-in.
    """
    process = int(metrics.get(HALTED_BY, 0)) - 1
    if process < 0:
        return None
    if jax.process_count() == 1:
        return SharedError(str(error))
    message = str(error) if error is not None and process == jax.process_index() else told_by(process)
    return SharedError(f"process {process} has no more data: {message}")
