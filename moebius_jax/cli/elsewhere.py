"""Folders in buckets, for a program that works on folders of this machine."""

import argparse
import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moebius_jax.buckets import fetched, is_bucket, require_writable
from moebius_jax.errors import UserError
from moebius_jax.files import AlreadyThere
from moebius_jax.outbox import Outbox

_EVERY_S = 30.0  # what a program that is killed has done since is done again
Track = Callable[..., Iterable[Any]]


class Elsewhere:
    """Which folders of this machine stand for which addresses, and what is sent there."""

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}
        self._outbox: Outbox | None = None

    def sending(self, track: Track) -> Track:
        """Around a loop over what is written: sends it now and then."""

        def tracked(items: Iterable[Any], **options: Any) -> Iterator[Any]:
            sent = time.monotonic()
            for item in track(items, **options):
                yield item
                if self._outbox is not None and time.monotonic() - sent > _EVERY_S:
                    self._send(self._outbox)
                    sent = time.monotonic()

        return tracked

    def told(self, value: Any) -> Any:
        """Text, or JSON-ready values, with addresses in the place of this machine's folders."""
        if isinstance(value, str):
            for here, address in self._addresses.items():
                value = value.replace(here, address)
        elif isinstance(value, Mapping):
            return {key: self.told(item) for key, item in value.items()}
        elif isinstance(value, list | tuple):
            return [self.told(item) for item in value]
        return value

    @contextlib.contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(self.told(str(error))) from None

    @staticmethod
    def _send(outbox: Outbox) -> None:
        try:
            outbox.send()
        except AlreadyThere:  # another evaluation's
            raise
        except UserError as error:  # later perhaps
            warnings.warn(f"{error}; it is sent with what comes next", stacklevel=2)


@contextlib.contextmanager
def worked_on_here(
    args: argparse.Namespace, *inputs: str, sets: Mapping[str, str] | None = None
) -> Iterator[Elsewhere]:
    """Replaces addresses among `args` by folders of this machine.

    Inputs are copied (`buckets.fetched`). `args.output` becomes a folder with what is in the bucket, and what
    is added to it is sent back: now and then, and at the end, whatever ended it (SIGKILL and power cuts
    excepted). Errors have the addresses.

    Args:
        args: with `output`, which may be None.
        inputs: names of those that are read; None where they are not given.
        sets: see `Outbox.take`.

    Raises:
        UserError: a bucket cannot be reached or written, or the output is in a folder of inputs.
    """
    here, dest = Elsewhere(), args.output
    is_there = dest is not None and is_bucket(dest)
    for place in filter(is_bucket, (getattr(args, name) or "" for name in inputs)):
        if is_there and f"{dest}/".startswith(f"{place}/"):
            raise UserError(f"{dest}: is in the folder of inputs {place}; choose another --output")
    if is_there:
        require_writable(dest)
    for name in inputs:
        if is_bucket(place := getattr(args, name) or ""):
            copy = fetched(place)
            setattr(args, name, copy)
            here._addresses[str(copy)] = str(place)
    if not is_there:
        with here._errors_told():
            yield here
        return
    outbox = Outbox(dest)
    try:
        outbox.take(sets or {})
    except BaseException:
        outbox.close()
        raise
    args.output, here._outbox = outbox.folder, outbox
    here._addresses[str(outbox.folder)] = str(dest)
    try:
        with _sigterm_ends_it(), here._errors_told():
            yield here
    except BaseException:
        if problem := _deliver(outbox):
            print(f"warning: {problem}", file=sys.stderr)
        raise
    if problem := _deliver(outbox):
        raise UserError(problem)


def _deliver(outbox: Outbox) -> str | None:
    """Sends what there is; or keeps it, and returns a line that says where."""
    try:
        outbox.send()
    except UserError as error:
        return f"{error}; what was to be sent is in {outbox.folder}"
    outbox.close()
    return None


@contextlib.contextmanager
def _sigterm_ends_it() -> Iterator[None]:
    """As Ctrl-C does: a machine that is taken away says so beforehand."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def standing_in(args: argparse.Namespace, *names: str) -> argparse.Namespace:
    """`args` with paths of this machine, where nothing is, for addresses: to look at all else before."""
    elsewhere = {name: Path(os.devnull) / name for name in names if is_bucket(getattr(args, name) or "")}
    return argparse.Namespace(**{**vars(args), **elsewhere})
