"""What a distillation step costs on TPU slices of growing size, compiled for them without one.

    python -m benchmarks.scale --sizes tiny --per-device 0                # a few minutes a row on two cores
    python -m benchmarks.scale                                            # reduced networks, half an hour
    python -m benchmarks.scale --sizes full --remat --accumulation 2 --topologies v5e:4x8     # over an hour

For each slice the step is compiled at --batch-size samples over all devices, and at --per-device samples on
each. Figures are of one device: memory by the compiler, milliseconds of its kernels by the compiler's
estimates and schedules, and the collectives with the bytes that come out of them. Their time is a model: a
ring over one axis of the torus at a time, at the published bandwidth of the links, and a microsecond for
every hop of every collective. Loops over parts of a batch are counted once. Run it in the environment of the
`aot` extra.
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import hlo, mosaic
from benchmarks.common import Row, parser, read_in, report, told
from benchmarks.train import SIZES, abstract_step, configure
from moebius_jax.cli.terminal import run
from moebius_jax.hardware import held_bytes, slice_devices
from moebius_jax.models.forms import platform_of
from moebius_jax.sharding import make_mesh
from moebius_jax.training.batches import check_batch

# Bytes a second in and out of a chip, all links together (Google's published figures).
LINKS = {"v4": 300e9, "v5e": 200e9, "v6e": 448e9}
HOP = 1e-6


def link_seconds(found: dict[str, tuple[int, int]], topology: str) -> tuple[float, float]:
    """Modelled time of the bytes, and of the hops."""
    kind, _, shape = topology.partition(":")
    sides = [int(side) for side in shape.split("x")]
    devices = math.prod(sides)
    passes = {"all-reduce": 2.0}  # there and back; all else goes round once
    nbytes = sum(passes.get(name, 1.0) * size for name, (_, size) in found.items())
    count = sum(passes.get(name, 1.0) * number for name, (number, _) in found.items())
    return nbytes * (devices - 1) / devices / LINKS[kind], count * HOP * sum(side // 2 for side in sides)


def measure(args: argparse.Namespace, topology: str, batch_size: int | None, schedules: Path) -> Row:
    """A row: the step of `batch_size` samples, or of `args.per_device` on each device.

    `schedules` is the folder that the compiler writes schedules to.
    """
    devices = slice_devices(topology)
    batch_size = batch_size or args.per_device * len(devices)
    config = configure(args, args.row, batch_size, platform_of(devices[0]))
    config = config.replace(fsdp=args.fsdp, accumulation=args.accumulation)
    mesh = make_mesh(devices, fsdp=config.fsdp)
    check_batch(config, mesh)
    compiled, text, seconds = read_in(abstract_step(config, mesh))
    found = hlo.collectives(text)
    moving, hopping = link_seconds(found, topology)
    target = topology.partition(":")[0]
    row: dict[str, Any] = {
        "slice": topology,
        "hosts": len({device.process_index for device in devices}),
        "batch": batch_size,
        "a device": batch_size / len(devices),
        "held GB": held_bytes(compiled) / 1e9,
        "temporaries GB": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "TFLOP": compiled.cost_analysis()["flops"] / 1e12,
    }
    if target in mosaic.CLOCK:
        kernels = mosaic.scheduled(hlo.kernels(text), schedules, target)
        row["kernels ms"] = 1e3 * sum(kernel.cycles for kernel in kernels) / mosaic.CLOCK[target]
    for name in ("all-reduce", "all-gather"):
        number, size = found.get(name, (0, 0))
        row |= {name: number, f"{name} GB": size / 1e9}
    row |= {"other collectives": sum(n for name, (n, _) in found.items() if name not in row)}
    return row | {"links ms": 1e3 * moving, "hops ms": 1e3 * hopping, "compiled in s": seconds}


def parse() -> argparse.Namespace:
    options = parser(__doc__, timed=False)
    add = options.add_argument
    add("--topologies", nargs="+", default=["v5e:4x8", "v5e:8x8", "v5e:16x16"], metavar="SLICE")
    add("--sizes", choices=SIZES, default="reduced", help="of the networks (default reduced)")
    add("--batch-size", type=int, default=768, help="over all devices; 0 for none (default: the paper's 768)")
    add("--per-device", type=int, default=8, help="samples of a device; 0 for none (default 8)")
    add("--fsdp", type=int, default=1)
    add("--accumulation", type=int, default=1)
    add("--remat", action="store_true")
    args = options.parse_args()
    for topology in args.topologies:
        if topology.partition(":")[0] not in LINKS:
            options.error(
                f"--topologies: {topology}; expected one of {', '.join(LINKS)} with its sides: v5e:4x8"
            )
    return argparse.Namespace(
        **vars(args), row="distillation, paper", dtype="bfloat16", stream_dtype="float32"
    )


def rows(args: argparse.Namespace, schedules: Path) -> Iterator[Row]:
    mosaic.write_schedules(schedules)
    batches = ([args.batch_size] if args.batch_size else []) + ([None] if args.per_device else [])
    for topology, batch_size in itertools.product(args.topologies, batches):
        yield measure(args, topology, batch_size, schedules)


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as schedules:
        return run(lambda: report(told(rows(args, Path(schedules))), args, device=", ".join(args.topologies)))


if __name__ == "__main__":
    sys.exit(main())
