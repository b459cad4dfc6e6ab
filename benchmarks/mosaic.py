"""How long a TPU kernel of ours takes by the schedule its compiler makes of it: XLA estimates its own alone.

libtpu writes down the bundles of instructions that a kernel's core goes through, one a cycle. How many
programs the grid has, and how often the loop in each turns, is told by exit tests: so often they count.
What main memory takes is held against the sum; waiting for it piece by piece is not in there.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from benchmarks.hlo import Array, Kernel, own_kernel

Shapes = tuple[str, ...]

CLOCK = {"v5e": 1.5e9, "v6e": 1.75e9}  # Hz
BANDWIDTH = {"v5e": 819e9, "v6e": 1640e9}  # bytes a second of main memory

STAGES = 2  # turns in which a first block is fetched and a last one put away

_BUNDLE = re.compile(r"\s*0(?:x[0-9a-f]+)?\s+(LB)?\w*\s*:\s*(>*)\s*\{")
_ARRAY = re.compile(r"inlined_call_operand\.\w+ \[shape: ([a-z0-9]+\[[0-9,]*\])")
_EXIT = re.compile(r":\s*(>+) \{.*scmp\.ge\.s32\.totalorder (%s\w+), (\d+) /\* loop exit test")


def write_schedules(folder: Path) -> None:
    """Has libtpu, which must not be loaded yet, write its schedules into this folder."""
    wanted = (
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*final_bundles",
    )
    os.environ["LIBTPU_INIT_ARGS"] = " ".join((os.environ.get("LIBTPU_INIT_ARGS", ""), *wanted))


def scheduled(kernels: list[Kernel], schedules: Path, target: str) -> list[Kernel]:
    """Kernels with cycles for ours too. The schedules are taken away: the next program's are others.

    Args:
        kernels: of a compiled program, ours with no cycles.
        schedules: the folder that `write_schedules` had the compiler write to.
        target: a key of `CLOCK`.

    Raises:
        ValueError: a schedule is built otherwise than `cycles_of` expects.
        KeyError: there is none of a kernel.
    """
    found = cycles(schedules, {own_kernel(kernel.instruction) for kernel in kernels} - {None})
    for path in schedules.iterdir():
        path.unlink()

    def priced(kernel: Kernel) -> Kernel:
        if not own_kernel(kernel.instruction):
            return kernel
        shapes = shapes_of((*kernel.operands, *kernel.instruction.arrays))
        moving = (kernel.read + kernel.written) / BANDWIDTH[target] * CLOCK[target]
        return dataclasses.replace(kernel, cycles=round(max(found[shapes], moving)))

    return [priced(kernel) for kernel in kernels]


def cycles(folder: Path, names: Collection[str]) -> dict[Shapes, int]:
    """Cycles of the kernels of these names, by operands and results; the longer where there are two."""
    found: dict[Shapes, int] = collections.defaultdict(int)
    for path in folder.glob("*-final_bundles.txt"):
        written = re.fullmatch(r"\d+-(\w+)(?:\.\d+)?-\d+-final_bundles", path.stem)
        if written and written[1] in names:
            text = path.read_text(errors="replace")
            shapes = tuple(_ARRAY.findall(text))
            found[shapes] = max(found[shapes], cycles_of(text))
    return dict(found)


def cycles_of(text: str) -> int:
    """Of one schedule: of one program or a grid of them, with one loop in each or none.

    Raises:
        ValueError: it is built otherwise.
    """
    grid = "iteration index" in text  # which a single program has none of
    by_depth: dict[int, int] = collections.Counter()
    loops: dict[int, int] = collections.Counter()
    for line in text.splitlines():
        if found := _BUNDLE.match(line):
            depth = len(found[2])
            by_depth[depth] += 1
            loops[depth] += bool(found[1])
    if max(by_depth) > 1 + grid or (loops[1] != 1 and grid) or max(loops[1], loops[2]) > 1:
        raise ValueError(f"no grid of programs with one loop each: loops {dict(loops)}")
    inner = sum(_turns(text, depth) * by_depth[depth] for depth in (1 + grid,) if loops[depth])
    if not grid:
        return by_depth[0] + inner
    return by_depth[0] + (_turns(text, 1) - STAGES) * (by_depth[1] + inner)


def shapes_of(arrays: Iterable[Array]) -> Shapes:
    """Of an instruction's operands and results, as the schedules name them."""
    return tuple(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in arrays)


def _turns(text: str, depth: int) -> int:
    tests = [(counter, int(end)) for marks, counter, end in _EXIT.findall(text) if len(marks) == depth]
    if len(tests) != 1:
        raise ValueError(f"{len(tests)} exit tests of a loop")
    counter, end = tests[0]
    step = re.search(rf"{re.escape(counter)} = sadd\.s32 (\d+), ", text)
    return -(-end // int(step[1] if step else 1))
