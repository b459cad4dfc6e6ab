"""The other processes of a job: telling them why this one ends, being told, and ending together."""

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

from moebius_jax.cluster import LOOK_S, keys, plain_text
from moebius_jax.errors import SharedError, UserError

_GRACE_S = 10.0  # for ending by oneself, with a message that says more
_GOODBYE_S = _GRACE_S + 5  # for the others to come, before one ends without them
_CLEANING_S = 30.0  # for what a failing process still has to close
_ENDED, _LEAVING, _SAID = "moebius/ended", "moebius/leaving", "moebius/said"


class Company:
    """The other processes of a job, to whom it is told when this one ends by an error, and the other way.

    Otherwise the rest would wait for it in their next common step, for minutes or for ever.
    Within `with company:` an error is told to all. They have ten seconds to end by themselves, then each
    prints the message and ends. A `SharedError` is known to all already. A process that is killed can tell
    nobody: jax notices it and ends the others (`cluster.HEARTBEAT_S`).
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
        message = plain_text(str(error) if isinstance(error, UserError | OSError) else repr(error))
        with contextlib.suppress(Exception):  # the one who keeps the keys may be gone
            keys().key_value_set(_ENDED, f"{jax.process_index()} {message}", allow_overwrite=True)
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

        while not self._is_over.wait(LOOK_S):
            try:
                said = keys().key_value_try_get(_ENDED)
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
            keys().wait_at_barrier(_LEAVING, int(1000 * _GOODBYE_S))
        if jax.process_index() == 0:
            time.sleep(LOOK_S)  # with it go the keys; jax would abort those who still look
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
            keys().key_value_set(f"{_SAID}/{me}", plain_text(message), allow_overwrite=True)


def told_by(process: int) -> str:
    """What a process told the others; "" if nothing can be had."""
    try:
        return keys().blocking_key_value_get(f"{_SAID}/{process}", int(1000 * _GRACE_S))
    except Exception:  # jaxlib raises what grpc says
        return ""
