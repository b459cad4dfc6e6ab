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
