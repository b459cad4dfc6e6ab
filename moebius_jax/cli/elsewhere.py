"""Folders in buckets, for a program that works on folders of this machine."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moebius_jax.buckets import Outbox, fetched, is_bucket
from moebius_jax.errors import UserError

_EVERY_S = 30.0  # what a program that is killed has done since is done again
Track = Callable[..., Iterable[Any]]


@contextlib.contextmanager
def worked_on_here(args: argparse.Namespace, *inputs: str) -> Iterator[Callable[[Track], Track]]:
    """Replaces addresses among `args` by folders of this machine.

    Inputs are copied (`buckets.fetched`). `args.output` becomes a folder with what is in the bucket, and what
    is added to it is sent back: now and then, and at the end, whatever ended it. Errors have the addresses.

    Args:
        args: with `output`, which may be None.
        inputs: names of those that are read; None where they are not given.

    Yields:
        What to wrap around loops over what is written, to have it sent now and then.

    Raises:
        UserError: a bucket cannot be reached, or the output is in a folder of inputs.
    """
    there, dest = {}, args.output
    for name in inputs:
        if is_bucket(place := getattr(args, name) or ""):
            if f"{dest or ''}/".startswith(f"{place}/"):
                raise UserError(f"{dest}: is in the folder of inputs {place}; choose another --output")
            setattr(args, name, fetched(place))
            there[getattr(args, name)] = place
    if dest is None or not is_bucket(dest):
        with _named(there):
            yield lambda track: track
        return
    outbox = Outbox(dest)
    args.output = outbox.folder
    there[outbox.folder] = dest
    try:
        with _named(there):
            outbox.take()
            yield lambda track: _sending(track, outbox)
    except BaseException:
        with contextlib.suppress(UserError):  # there are worse troubles
            outbox.send()
            outbox.close()
        raise
    try:
        outbox.send()
    except UserError as error:
        raise UserError(f"{error}; what was to be sent is in {outbox.folder}") from None
    outbox.close()


def _sending(track: Track, outbox: Outbox) -> Track:
    def tracked(items: Iterable[Any], **options: Any) -> Iterator[Any]:
        sent = time.monotonic()
        for item in track(items, **options):
            yield item
            if time.monotonic() - sent > _EVERY_S:
                outbox.send()
                sent = time.monotonic()

    return tracked


@contextlib.contextmanager
def _named(there: dict[Any, Any]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        text = str(error)
        for here, address in there.items():
            text = text.replace(str(here), str(address))
        raise UserError(text) from None
