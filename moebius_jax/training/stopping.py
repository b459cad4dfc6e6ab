"""Being told to stop: by a signal, to one process or to all."""

import dataclasses
import signal
from typing import Any

import jax


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
