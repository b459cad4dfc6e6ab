"""Joining the other processes of a job, meeting them, and sharing what the first of them finds out."""

import time
from collections.abc import Callable
from typing import Any

from moebius_jax.errors import SharedError, UserError, first_line

HEARTBEAT_S = 50  # a process that is killed ends the others after so long
LOOK_S = 1.0  # between two looks at what others have said
_A_WEEK_S = 7 * 24 * 3600.0
_LONGEST = 2048  # of a message, bytes


def join_cluster(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects this process to the others; what is not given, jax asks the cluster for.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes, process_id: how many there are, and which this is.

    Raises:
        UserError: there is no cluster to ask, or it cannot be joined.
    """
    import jax
    from jax.experimental import multihost_utils

    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_S
        )
        if jax.default_backend() == "cpu":  # there, who comes 30 s later to the first meeting comes too late
            multihost_utils.sync_global_devices("joined")
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"no cluster could be joined ({first_line(error)}); outside TPU pods, SLURM and the like pass "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        ) from None


def join_given_cluster(
    is_cluster: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes, if the command line names any.

    Args:
        is_cluster: ask the cluster this process was started in.
        coordinator, num_processes, process_id: see `join_cluster`; all or none.

    Raises:
        UserError: incomplete arguments, or no cluster to join.
    """
    given = [v is not None for v in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id go together")
    if is_cluster or any(given):
        join_cluster(coordinator, num_processes, process_id)


def first_does(action: Callable[[], object]) -> None:
    """Has process 0 do something, and every process raise what it raised.

    Raises:
        UserError, OSError: as `action` did in process 0.
    """
    import jax

    error: UserError | OSError | None = None
    if jax.process_index() == 0:
        try:
            action()
        except (UserError, OSError) as raised:
            error = raised
    if jax.process_count() > 1:
        error = _told_by_the_first(error)
    if error is not None:
        raise error


def wait_for_all(what: str, limit_s: float = _A_WEEK_S) -> None:
    """Returns when every process has come here; `what` must be another name each time.

    For places that processes reach at very different times: collectives and jax's own end have limits.

    Raises:
        UserError: some have not come in time.
    """
    import jax

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    place, until = f"moebius/at/{what}", time.monotonic() + limit_s
    keys().key_value_set(f"{place}/{jax.process_index()}", "", allow_overwrite=True)
    # Not a barrier of jax's: Python would see no signal within one.
    while len(keys().key_value_dir_get(place)) < jax.process_count():
        if time.monotonic() > until:
            raise UserError(f"not all processes came to '{what}' within {limit_s:.0f} s")
        time.sleep(LOOK_S)


def plain_text(message: str) -> str:
    """As the keys take it: file names may hold what is no UTF-8."""
    return message[:_LONGEST].encode("utf-8", "backslashreplace").decode()


def keys() -> Any:
    """The keys and barriers that the job's first process holds for all; jax has no public name for them."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def _told_by_the_first(error: UserError | OSError | None) -> UserError | OSError | None:
    import numpy as np
    from jax.experimental import multihost_utils

    message = np.zeros(_LONGEST, np.uint8)
    if error is not None:
        kind = "O" if isinstance(error, OSError) else "U"
        said = (kind + plain_text(str(error))).encode()[: len(message)]
        message[: len(said)] = np.frombuffer(said, np.uint8)
    told = multihost_utils.broadcast_one_to_all(message).tobytes().rstrip(b"\0")
    if not told:
        return None
    return (OSError if told[:1] == b"O" else SharedError)(told[1:].decode(errors="replace"))
