"""Being told to stop, by a signal, to one process or to all; and closing what a run has open."""

import contextlib
import dataclasses
import signal
import sys
from typing import Any, Protocol

import jax

from moebius_jax.errors import UserError


class Closes(Protocol):
    """Part of a run that has something open."""

    def close(self) -> None: ...


def close_all(*parts: Closes, is_failing: bool) -> None:
    """Closes each of them in this order, whatever the others meet.

    Args:
        parts: of a run.
        is_failing: an error is on its way already; it stays the one that is told, and what is met here
            becomes a warning.

    Raises:
        UserError: what one of them met.
    """
    with contextlib.ExitStack() as rest:
        for part in reversed(parts):
            rest.callback(_close, part, is_failing)


def _close(part: Closes, is_failing: bool) -> None:
    try:
        part.close()
    except UserError as error:
        if not is_failing:
            raise
        print(f"warning: {error}", file=sys.stderr)


@dataclasses.dataclass
class Stop:
    """Whether somebody wants the run to end."""

    asked: bool = False

    @classmethod
    def on(cls, *signals: signal.Signals) -> "Stop":
        """Asked for by any of these signals; a second one of the same kind ends the program at once.

        Among several processes jax listens to SIGTERM itself and has all agree on a step.
        """
        stop = cls()

        def ask(number: int, _: Any) -> None:
            stop.asked = True
            signal.signal(number, signal.SIG_DFL)

        if jax.process_count() == 1:
            for number in signals:
                signal.signal(number, ask)
        return stop

    def agreed(self, step: int) -> bool:
        """Whether the run ends before this step; all processes get the same answer."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            self.asked |= multihost_utils.reached_preemption_sync_point(step)
        return self.asked
