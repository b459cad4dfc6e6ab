"""Speed and cost of a distillation step: one command, a table and JSON.

    python benchmarks/train.py                              # this accelerator: batch 8 and 32 of latents
    python benchmarks/train.py --sizes tiny --batch-sizes 4 # something small
    python benchmarks/train.py --costs-only                 # counts of the full-size step, nothing is run

Rows: the whole step in either form of the weights, and what its parts cost: the student alone (plain forward
and backward pass on the task loss, with the optimiser), teacher forward, perceptual loss, Muon.
Latents are made up; networks are drawn at random: speed does not depend on either.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from moebius_jax.data.sources import SyntheticSource
from moebius_jax.training.encode import latent_batch, to_devices
from moebius_jax.training.program import Program

from moebius_jax.data.config import DataConfig
from moebius_jax.data.loader import Loader, LoaderConfig
from moebius_jax.distillation.balance import LossConfig
from moebius_jax.distillation.gradients import teacher_coarse_index
from moebius_jax.distillation.perceptual import elatentlpips
from moebius_jax.hardware import peak_flops
from moebius_jax.models import ELatentLPIPSConfig, UNetConfig
from moebius_jax.sharding import make_mesh
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.networks import load_metric, load_teacher
from moebius_jax.training.optimizer import OptimizerConfig

TINY = {"num_heads": 4, "latent_size": 16, "embedding_dim": 32, "context_dim": 32, "layers_per_block": 1}
SIZES = {
    "full": (UNetConfig.student(), UNetConfig.teacher(), ELatentLPIPSConfig()),
    "tiny": (
        UNetConfig.student(channels=(32, 64), transformers=(True, True), **TINY),
        UNetConfig.teacher(channels=(32, 64, 64), transformers=(True, True, False), **TINY),
        ELatentLPIPSConfig(groups=((16,), (16,), (16,), (16,), (16,))),
    ),
}
ALL = ("coarse", "fine", "task", "perceptual")
# Row → losses, form, optimiser. Differences between rows are the parts' shares.
ROWS = {
    "distillation, paper": (ALL, "paper", "muon"),
    "distillation, release": (ALL, "release", "muon"),
    "without perceptual": (ALL[:3], "paper", "muon"),
    "student alone": (("task",), "paper", "muon"),
    "student alone, AdamW": (("task",), "paper", "adamw"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stream-dtype", default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--costs-only", action="store_true", help="compile, count, do not run")
    parser.add_argument("--parts", action="store_true", help="also count teacher and perceptual loss alone")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def configure(args: argparse.Namespace, row: str, batch_size: int) -> TrainConfig:
    student, teacher, metric = SIZES[args.sizes]
    terms, balance, optimizer = ROWS[row]
    return TrainConfig(
        student=student.replace(remat=args.remat),
        teacher=teacher,
        metric=metric,
        loss=LossConfig(terms=terms, balance=balance),
        optimizer=OptimizerConfig(name=optimizer),
        data=DataConfig(kind="synthetic", loader=LoaderConfig(threads=1)),
        batch_size=batch_size,
        dtype=args.dtype,
        stream_dtype=args.stream_dtype,
    )


def measure(args: argparse.Namespace, row: str, batch_size: int) -> dict[str, Any]:
    config, mesh = configure(args, row, batch_size), make_mesh(1)
    abstract = args.costs_only
    program = Program(
        config,
        mesh,
        teacher=load_teacher(config, mesh, abstract=abstract),
        metric=load_metric(config, mesh, abstract=abstract),
    )
    state = program.abstract_state if abstract else program.initial_state()
    started = time.perf_counter()
    step = program.compile(state)
    result: dict[str, Any] = {"row": row, "batch": batch_size, "compile_s": time.perf_counter() - started}
    memory = step.memory_analysis()
    if program.flops:
        result["tflop"] = program.flops / 1e12
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        result["gb"] = (held + memory.temp_size_in_bytes) / 1e9
    if abstract:
        return result
    source = SyntheticSource(config.student.latent_size)
    loader = Loader(source, config.data.loader, seed=0, global_batch=batch_size)
    batch = latent_batch(to_devices(next(loader), mesh), None)
    times = []
    for _ in range(args.repeats + 2):
        started = time.perf_counter()
        state, metrics = step(state, program.frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[2:])
    result |= {"ms": 1e3 * seconds, "images_per_s": batch_size / seconds}
    peak = peak_flops(jax.devices()[0].device_kind)
    if program.flops and peak:
        result["of_peak"] = program.flops / seconds / (peak * mesh.size)
    return result


def count_parts(args: argparse.Namespace, batch_size: int) -> list[dict[str, Any]]:
    """FLOPs of a teacher's forward pass, and of the perceptual loss with its gradient, by themselves."""
    config, mesh = configure(args, "distillation, paper", batch_size), make_mesh(1)
    teacher = load_teacher(config, mesh, abstract=True)
    metric = load_metric(config, mesh, abstract=True)
    side = config.student.latent_size

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    def teach(tensors: Any, x: Any, t: Any, ids: Any) -> Any:
        out = teacher.bare(tensors)(x, t, ids)
        return out.sample, out.features[teacher_coarse_index(teacher.bare.config)]

    def perceive(tensors: Any, a: Any, b: Any, keys: Any) -> Any:
        network = metric.bare(tensors)
        return jax.value_and_grad(lambda a: elatentlpips(network, a, b, config.perceptual, keys).mean())(a)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    latents = array(side, side, 4)
    parts = {
        "teacher, forward": jax.jit(teach).lower(
            teacher.tensors, array(side, side, 9), array(dtype=jnp.int32), array(10, dtype=jnp.int32)
        ),
        "perceptual, with gradient": jax.jit(perceive).lower(metric.tensors, latents, latents, keys),
    }
    return [
        {"row": name, "batch": batch_size, "tflop": lowered.compile().cost_analysis()["flops"] / 1e12}
        for name, lowered in parts.items()
    ]


def main() -> int:
    args = parse()
    rows = []
    for batch_size in args.batch_sizes:
        for row in args.rows:
            rows.append(measure(args, row, batch_size))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if args.parts:
            rows += count_parts(args, batch_size)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, jax {jax.__version__}, {device}, {args.dtype}, {args.sizes}\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), sep="\n")
    for row in rows:
        cells = (row.get(c, "") for c in columns)
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in cells) + " |")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "jax": jax.__version__, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
