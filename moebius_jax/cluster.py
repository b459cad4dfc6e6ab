"""Joining the other processes of a job, and ending with them."""

from collections.abc import Callable

from moebius_jax.errors import UserError, first_line


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

    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
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


def _told_by_the_first(error: UserError | OSError | None) -> UserError | OSError | None:
    import numpy as np
    from jax.experimental import multihost_utils

    message = np.zeros(2048, np.uint8)
    if error is not None:
        said = (b"O" if isinstance(error, OSError) else b"U") + str(error).encode()[: len(message) - 1]
        message[: len(said)] = np.frombuffer(said, np.uint8)
    told = multihost_utils.broadcast_one_to_all(message).tobytes().rstrip(b"\0")
    if error is not None or not told:
        return error
    return (OSError if told[:1] == b"O" else UserError)(told[1:].decode(errors="replace"))
