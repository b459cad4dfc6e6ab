"""Joining the other processes of a job, sharing what one of them finds out, and ending with them."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from moebius_jax.errors import SharedError, UserError, first_line

_HEARTBEAT_S = 50  # a process that is killed ends the others after so long
_LOOK_S = 1.0
_GRACE_S = 10.0  # for ending by oneself, with a message that says more
_GOODBYE_S = _GRACE_S + 5  # for the others to come, before one ends without them
_CLEANING_S = 30.0  # for what a failing process still has to close
_A_WEEK_S = 7 * 24 * 3600.0
_ENDED, _LEAVING, _SAID = "moebius/ended", "moebius/leaving", "moebius/said"
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
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_S
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
    _client().key_value_set(f"{place}/{jax.process_index()}", "", allow_overwrite=True)
    # Not a barrier of jax's: Python would see no signal within one.
    while len(_client().key_value_dir_get(place)) < jax.process_count():
        if time.monotonic() > until:
            raise UserError(f"not all processes came to '{what}' within {limit_s:.0f} s")
        time.sleep(_LOOK_S)


class Company:
    """The other processes of a job, to whom it is told when this one ends by an error, and the other way.

    Otherwise the rest would wait for it in their next common step, for minutes or for ever.
    Within `with company:` an error is told to all. They have ten seconds to end by themselves, then each
    prints the message and ends. A `SharedError` is known to all already. A process that is killed can tell
    nobody: jax notices it and ends the others (`_HEARTBEAT_S`).
    """

    def __init__(self) -> None:
        self._has_told = False
        self._is_over = threading.Event()
        self._is_leaving = threading.Lock()

    def __enter__(self) -> Self:
        import jax

        if jax.process_count() > 1:
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: TracebackType | None) -> None:
        if error is not None:
            self.tell(error)
        self._is_over.set()

    def tell(self, error: BaseException) -> None:
        """All processes are to end because of this; this one too, if what it still does takes too long."""
        import jax

        if jax.process_count() == 1 or self._has_told or isinstance(error, SharedError):
            return
        self._has_told = True
        message = _text(str(error) if isinstance(error, UserError | OSError) else repr(error))
        with contextlib.suppress(Exception):  # the one who keeps the keys may be gone
            _client().key_value_set(_ENDED, f"{jax.process_index()} {message}", allow_overwrite=True)
        threading.Thread(target=self._end_late, args=(message,), daemon=True).start()

    def run(self, program: Callable[[], int]) -> int:
        """What `program` returns; after an error that was told the process ends here, without jax's own
        waiting for processes that cannot come any more."""
        try:
            status = program()
        except BaseException as error:
            if not self._has_told:
                raise
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            status = 1
        if self._has_told:
            self._leave(status)
        return status

    def _listen(self) -> None:
        import jax

        while not self._is_over.wait(_LOOK_S):
            try:
                said = _client().key_value_try_get(_ENDED)
            except Exception:  # nothing said yet
                continue
            process, _, message = said.partition(" ")
            if int(process) != jax.process_index() and not self._is_over.wait(_GRACE_S):
                print(f"error: process {process} has ended: {message}", file=sys.stderr)
                self._leave(1)
            return

    def _end_late(self, message: str) -> None:
        time.sleep(_CLEANING_S)
        if not self._is_leaving.locked():
            print(f"error: {message}", file=sys.stderr)
            self._leave(1)

    def _leave(self, status: int) -> None:
        import jax

        if not self._is_leaving.acquire(blocking=False):
            time.sleep(2 * _GOODBYE_S)  # another thread is about to end us
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):  # who does not come is hung, or gone
            _client().wait_at_barrier(_LEAVING, int(1000 * _GOODBYE_S))
        if jax.process_index() == 0:
            time.sleep(_LOOK_S)  # with it go the keys; jax would abort those who still look
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(status)


def is_lost_connection(error: Exception) -> bool:
    """Whether a common step failed because a process is gone, and not for its own reasons (memory, say)."""
    text = str(error)
    return any(said in text for said in ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"))


def tell_others(message: str) -> None:
    """Prints what ends this process's work, and keeps it for the others' `told_by`."""
    import jax

    if jax.process_count() > 1:
        me = jax.process_index()
        print(f"process {me} cannot go on, all end after this step: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # then they learn who, and not why
            _client().key_value_set(f"{_SAID}/{me}", _text(message), allow_overwrite=True)


def told_by(process: int) -> str:
    """What a process told the others; "" if nothing can be had."""
    try:
        return _client().blocking_key_value_get(f"{_SAID}/{process}", int(1000 * _GRACE_S))
    except Exception:  # jaxlib raises what grpc says
        return ""


def _text(message: str) -> str:
    """As the keys take it: file names may hold what is no UTF-8."""
    return message[:_LONGEST].encode("utf-8", "backslashreplace").decode()


def _client() -> Any:
    """The keys and barriers of the job's first process; jax has no public name for them."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def _told_by_the_first(error: UserError | OSError | None) -> UserError | OSError | None:
    import numpy as np
    from jax.experimental import multihost_utils

    message = np.zeros(_LONGEST, np.uint8)
    if error is not None:
        kind = "O" if isinstance(error, OSError) else "U"
        said = (kind + _text(str(error))).encode()[: len(message)]
        message[: len(said)] = np.frombuffer(said, np.uint8)
    told = multihost_utils.broadcast_one_to_all(message).tobytes().rstrip(b"\0")
    if not told:
        return None
    return (OSError if told[:1] == b"O" else SharedError)(told[1:].decode(errors="replace"))
