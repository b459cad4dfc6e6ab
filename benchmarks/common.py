"""What the benchmarks share: timing what is compiled already, and the table with its surroundings."""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from moebius_jax.files import replace_when_complete
from moebius_jax.hardware import compile_and_read

Row = dict[str, Any]
Call = Callable[..., Any]


@contextlib.contextmanager
def wrapped_calls(
    network: nnx.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While it lasts, a call of any module of the network's classes is `wrap` of what it was."""
    classes = {type(module) for _, module in nnx.iter_modules(network) if callable(module)}
    own = {cls: cls.__dict__.get("__call__") for cls in classes}
    wrapped = {cls: wrap(cls.__call__) for cls in classes}
    try:
        for cls, call in wrapped.items():
            cls.__call__ = call
        yield
    finally:
        for cls, call in own.items():
            if call is None:  # it was inherited
                del cls.__call__
            else:
                cls.__call__ = call


def parser(doc: str, *, timed: bool = True) -> argparse.ArgumentParser:
    """Options every benchmark has; `timed` is one that repeats calls to time them."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if timed:
        made.add_argument("--repeats", type=int, default=5, help="timed calls, of which the median counts")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return made


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call until its results are there, after one that is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compiled_in(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """The program and how many seconds it took."""
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def read_in(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str, float]:
    """A program for a TPU slice, its text, and how many seconds it took."""
    start = time.perf_counter()
    return *compile_and_read(lowered), time.perf_counter() - start


def told(rows: Iterable[Row]) -> list[Row]:
    """All rows; each is shown when it is there."""
    done = []
    for row in rows:
        done.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return done


def report(rows: list[Row], args: argparse.Namespace, *, device: str | None = None) -> int:
    """Prints date, versions, device and a table; returns the exit status."""
    device = device or f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, jax {jax.__version__}, {device}\n")
    print(f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), sep="\n")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        print(f"| {' | '.join(f'{v:.5g}' if isinstance(v, float) else str(v) for v in cells)} |")
    if args.json:
        found = {"device": device, "jax": jax.__version__, "rows": rows}
        with replace_when_complete(args.json, overwrite=True) as partial:
            partial.write_text(json.dumps(found, indent=2) + "\n")
    return 0
