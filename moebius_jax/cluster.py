"""Joining the other processes of a job."""

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
