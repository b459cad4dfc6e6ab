"""Saving and resuming a run: asynchronous Orbax checkpoints of state, data position and configuration."""

import enum
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moebius_jax import buckets
from moebius_jax.buckets import is_bucket, reaching
from moebius_jax.cluster import first_does
from moebius_jax.errors import SharedError, UserError, first_line
from moebius_jax.files import replace_when_complete
from moebius_jax.schema import AtLeastZero, Seed, checked, parse_json
from moebius_jax.training.config import CheckpointConfig, TrainConfig
from moebius_jax.training.state import TrainState
from moebius_jax.weights import checksums
from moebius_jax.weights.folder import quiet_storage

FOLDER = "checkpoints"
_SEEN_WITHIN_S = 10  # shared file systems may show a new file late
_SMALLEST_SLICE = 1 << 14  # bytes: of the full student's state nearly all, on 8 devices and on 32
# What storage says of itself, not of what it holds.
_OUT_OF_REACH = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
)
# Fields that another start of the same run may well have changed.
_UNREMARKABLE = ("steps", "checkpoint.", "log.", "data.loader.", "fsdp", "init", "verify")


class _Fate(enum.IntEnum):
    """Of reading a checkpoint, the better first."""

    READ = 0
    DAMAGED = 1
    REFUSED = 2


@checked
class _Position:
    """Where a checkpoint's run is in its data."""

    samples: AtLeastZero
    seed: Seed


class RunCheckpoints:
    """The checkpoints of one run's folder.

    A checkpoint of step s holds the state after s steps and the data position before batch s, so a resumed
    run sees each batch exactly once. The state is stored leaf by leaf under the leaf's own name, and restores
    onto any mesh.

    Args:
        folder: of the run.
        config: how many to keep.
        warn: told of checkpoints that cannot be read.
        verify: compare a checkpoint with its checksums before it is read.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, warn: Callable[[str], None], *, verify: bool = True
    ) -> None:
        _cut_large_tensors_only()
        self.folder = _absolute(folder / FOLDER)
        self._warn = warn
        self._verify = verify
        # A bucket has sums of its own: no object of it is read again, or comes damaged.
        sum_up = None if is_bucket(folder) else self._sum_up
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            keep_period=config.keep_every,
            enable_async_checkpointing=True,
            step_prefix="step",
            async_options=ocp.AsyncOptions(post_finalization_callback=sum_up),
        )
        buckets.require_writable(self.folder)
        try:
            with reaching(folder):
                self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None

    @property
    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        step = self._manager.latest_step()
        return None if step is None else self._path(step)

    def save(self, state: TrainState, samples: int, config: dict[str, Any]) -> None:
        """Starts saving; returns when the state may be given away to the next step.

        Args:
            state: to save.
            samples: how many the run has drawn.
            config: of the run, flat.

        Raises:
            UserError: it cannot be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        try:
            with reaching(self.folder):
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(_named(state)),
                        data=ocp.args.JsonSave({"samples": samples, "seed": config["seed"]}),
                        config=ocp.args.JsonSave(config),
                    ),
                    force=True,
                )
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path(step)}: cannot be written ({first_line(error)})") from None

    def restore(self, target: TrainState, config: dict[str, Any]) -> tuple[TrainState, int] | None:
        """The newest state that can be read, and the samples drawn so far; None where there is none at all.

        Checkpoints that cannot be read are put aside under another name, and settings that are not those of
        the checkpoint are warned of.

        Args:
            target: shapes, dtypes and shardings.
            config: of the run, flat; the data are in another order for every seed.

        Raises:
            UserError: there are checkpoints, and none can be read; or the newest is of another seed, network
                or prediction, or where this process cannot read it.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored, position, error = *self._read(step, target), None
            except Exception as raised:  # storage libraries raise whatever they meet
                error = raised
            refusal = self._refusal(step, error, target) if error else None
            worst = _worst_of_all(_Fate.REFUSED if refusal else _Fate.DAMAGED if error else _Fate.READ)
            if worst == _Fate.REFUSED:
                raise refusal or UserError(f"{self._path(step)}: another process cannot read it")
            if worst == _Fate.DAMAGED:
                self._put_aside(step, first_line(error) if error else "so another process finds")
                continue
            self._require_same_run(step, position, restored["config"], config)
            self._tell_changes(restored["config"], config)
            return _unnamed(target, restored["state"]), position.samples
        if steps:
            raise UserError(f"{self.folder}: none of its {len(steps)} checkpoints can be read")
        return None

    def wait(self) -> None:
        """Until everything started is on disk.

        Raises:
            UserError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise UserError(f"{self.folder}: cannot be written ({first_line(error)})") from None

    def close(self) -> None:
        """Waits for what is being written; errors as for `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _sum_up(self) -> None:
        """Adds checksums to a checkpoint that is written and has not its final name yet."""
        if jax.process_index() > 0:
            return
        for path in self.folder.glob("step_*-tmp*"):
            checksums.write_checksums(path)

    def _tell_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        now = json.loads(json.dumps(now, default=str))
        if not isinstance(before, dict):
            return
        for key in sorted(before.keys() & now.keys()):
            if before[key] != now[key] and not key.startswith(_UNREMARKABLE):
                self._warn(f"{key} was {before[key]} so far, it is {now[key]} from here on")

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _read(self, step: int, target: TrainState) -> tuple[Any, _Position]:
        """What is stored, and where in its data; raises whatever storage libraries do."""
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(_named(target)),
            data=ocp.args.JsonRestore(),
            config=ocp.args.JsonRestore(),
        )
        with quiet_storage():
            # By one process: the others' restores read parts only.
            if self._verify and not is_bucket(self.folder):
                first_does(lambda: checksums.verify_checksums(self._path(step)))
            restored = self._manager.restore(step, args=wanted)
        return restored, parse_json(json.dumps(restored["data"]), _Position)

    def _refusal(self, step: int, error: Exception, target: TrainState) -> UserError | None:
        """Why a run must not go on without this checkpoint; None if it is damaged."""
        stored = self._stored_shapes(step)
        expected = {name: tuple(leaf.shape) for name, leaf in _named(target).items()}
        if stored and stored != expected:
            different = sorted(k for k in {**stored, **expected} if stored.get(k) != expected.get(k))
            return UserError(
                f"{self._path(step)}: of another configuration; {len(different)} tensors differ, such as "
                f"{different[0]}: stored {stored.get(different[0])}, expected {expected.get(different[0])}. "
                "Use another --workdir, or init=FOLDER to take over weights only"
            )
        out_of_reach = any(word in str(error) for word in _OUT_OF_REACH)
        if isinstance(error, OSError | MemoryError) or out_of_reach:
            return UserError(f"{self._path(step)}: cannot be read ({first_line(error)})")
        return None

    def _put_aside(self, step: int, why: str) -> None:
        self._warn(f"{self._path(step)}: damaged, going back to the one before ({why})")
        aside = self.folder.parent / f"damaged_{self._path(step).name}_{int(time.time())}"
        first_does(lambda: buckets.move(self._path(step), aside))
        if is_bucket(self.folder):
            buckets.forget_listings()
        self._manager.reload()

    def _require_same_run(
        self, step: int, position: _Position, before: dict[str, Any], now: dict[str, Any]
    ) -> None:
        """Raises UserError if the data are in another order, or the network's output means something else."""
        kind = "student.prediction_type"
        before = before if isinstance(before, dict) else {}
        found = {"seed": position.seed, kind: before.get(kind, "epsilon")}
        for name, value in found.items():
            if value != now.get(name, value):
                raise UserError(
                    f"{self._path(step)}: of a run with {name}={value}; this one has {name}={now[name]}. "
                    "Use another --workdir"
                )

    def _stored_shapes(self, step: int) -> dict[str, tuple[int, ...]] | None:
        try:
            metadata = self._manager.item_metadata(step)["state"]
            return {name: tuple(leaf.shape) for name, leaf in metadata.items()}
        except Exception:  # as damaged as the rest
            return None


@functools.cache
def _cut_large_tensors_only() -> None:
    """Has each device write its part of a replicated tensor only where that is worth a slice of its own.

    By default Orbax cuts thousands of small ones for every device, while the next step waits.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_SLICE)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def _worst_of_all(fate: _Fate) -> _Fate:
    """What it is among all processes: they go on with the same checkpoint, or with none."""
    if jax.process_count() == 1:
        return fate
    from jax.experimental import multihost_utils

    return _Fate(int(multihost_utils.process_allgather(np.int32(fate)).max()))


def first_batch(samples: int, config: TrainConfig) -> int:
    """Number of the batch a run goes on with after so many samples, perhaps of batches of another size.

    Raises:
        UserError: the samples drawn so far are no whole number of batches.
    """
    if samples % config.batch_size:
        raise UserError(
            f"batch_size is {config.batch_size}; the run has drawn {samples} samples so far, which is no "
            "whole number of such batches. Use a divisor of the former batch size"
        )
    return samples // config.batch_size


def require_run_folder(folder: Path) -> None:
    """Raises UserError if there is a `config.json` that is no run's."""
    there = folder / "config.json"
    if there.exists() and not (there.is_file() and b"optimizer.learning_rate" in there.read_bytes()):
        raise UserError(f"{there}: not replaced, it is of no run; use another --workdir")


def require_shared_folder(folder: Path) -> None:
    """Raises SharedError unless what process 0 writes into the folder is there for every process.

    Each process writes its part of a checkpoint: in folders of their own none would be whole.
    """
    if jax.process_count() == 1:
        return
    with reaching(folder):
        _require_shared_folder(folder)


def _require_shared_folder(folder: Path) -> None:
    from jax.experimental import multihost_utils

    number = int(multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31)))
    mark = folder / f".seen-by-all-{number}"
    first_does(mark.touch)
    until = time.monotonic() + _SEEN_WITHIN_S
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.bool_(seen)))
    first_does(mark.unlink)
    if len(blind):
        those = ", ".join(map(str, blind))
        raise SharedError(
            f"{_absolute(folder)}: process {those} of {jax.process_count()} does not see what process 0 "
            "writes there; --workdir must be one folder that all hosts share"
        )


def write_run_config(folder: Path, config: dict[str, Any]) -> None:
    """Puts the configuration beside the checkpoints, for people."""
    with replace_when_complete(folder / "config.json", overwrite=True) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def _absolute(folder: Path) -> Path:
    return folder if is_bucket(folder) else folder.absolute()


def _named(state: TrainState) -> dict[str, Any]:
    """Leaves by readable path: "params/conv_in.pointwise.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _unnamed(like: TrainState, named: dict[str, Any]) -> TrainState:
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return jax.tree_util.tree_unflatten(structure, [named[name] for name in names])
