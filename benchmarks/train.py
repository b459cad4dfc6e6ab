"""Speed and cost of a distillation step: one command, a table and JSON.

    python -m benchmarks.train                              # this accelerator: batch 8 and 32 of latents
    python -m benchmarks.train --sizes tiny --batch-sizes 4 # something small
    python -m benchmarks.train --costs-only                 # counts of the full-size step, nothing is run

Rows: the whole step in either form of the weights, and what its parts cost: the student alone (plain forward
and backward pass on the task loss, with the optimiser), teacher forward, perceptual loss, Muon.
Latents are made up; networks are drawn at random: speed does not depend on either.
"""

import argparse
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.common import Row, compiled_in, median_seconds, parser, report, told
from moebius_jax.data.config import DataConfig, open_dataset
from moebius_jax.data.loader import LoaderConfig
from moebius_jax.distillation.config import LossConfig
from moebius_jax.distillation.gradients import teacher_bottleneck
from moebius_jax.distillation.perceptual import Perceptual
from moebius_jax.hardware import held_bytes, peak_flops
from moebius_jax.models import ELatentLPIPSConfig, UNetConfig
from moebius_jax.sharding import make_mesh
from moebius_jax.training.batches import abstract_batch, encoded, to_devices
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.loading import first_batches
from moebius_jax.training.networks import TEACHER, FrozenNetwork, load_frozen
from moebius_jax.training.optimizer import OptimizerConfig, run_optimizer
from moebius_jax.training.state import abstract_state, initial_state
from train import make_update, step_flops

TINY = {"num_heads": 4, "latent_size": 16, "embedding_dim": 32, "context_dim": 32, "layers_per_block": 1}
SIZES = {
    "full": (UNetConfig.student(), UNetConfig.teacher(), ELatentLPIPSConfig()),
    # Two levels of one layer, at full width: what the full step is made of, compiled in a minute.
    "reduced": (
        UNetConfig.student(channels=(320, 640), transformers=(True, True), layers_per_block=1),
        UNetConfig.teacher(channels=(320, 640, 640), transformers=(True, True, False), layers_per_block=1),
        ELatentLPIPSConfig(),
    ),
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
    options = parser(__doc__)
    add = options.add_argument
    add("--sizes", choices=SIZES, default="full")
    add("--batch-sizes", type=int, nargs="+", default=[8, 32])
    add("--dtype", default="bfloat16")
    add("--stream-dtype", default="float32")
    add("--remat", action="store_true")
    add("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    add("--costs-only", action="store_true", help="compile, count, do not run")
    add("--parts", action="store_true", help="also count teacher and perceptual loss alone")
    return options.parse_args()


def configure(
    args: argparse.Namespace, row: str, batch_size: int, platform: str | None = None
) -> TrainConfig:
    """The run of a row; `platform` is the one it is compiled for, where it is another."""
    student, teacher, network = SIZES[args.sizes]
    terms, balance, optimizer = ROWS[row]
    return TrainConfig(
        student=student.replace(remat=args.remat, platform=platform),
        teacher=teacher,
        loss=LossConfig(terms=terms, balance=balance, perceptual=Perceptual(network=network)),
        optimizer=OptimizerConfig(name=optimizer),
        data=DataConfig(kind="synthetic", loader=LoaderConfig(threads=1)),
        batch_size=batch_size,
        dtype=args.dtype,
        stream_dtype=args.stream_dtype,
    )


def lowered(
    config: TrainConfig, mesh: Mesh, networks: dict[str, FrozenNetwork], optimizer: Any
) -> jax.stages.Lowered:
    """The step of a run."""
    frozen = {name: network.tensors for name, network in networks.items()}
    update = make_update(config, mesh, networks, optimizer)
    return update.lower(abstract_state(config, mesh, optimizer), frozen, abstract_batch(config, mesh))


def abstract_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The same without any array."""
    networks = load_frozen(config, mesh, abstract=True)
    return lowered(
        config, mesh, networks, run_optimizer(config.optimizer, config.student, config.steps, mesh)
    )


def measure(args: argparse.Namespace, row: str, batch_size: int) -> Row:
    config = configure(args, row, batch_size)
    mesh = make_mesh(jax.devices()[:1])
    networks = load_frozen(config, mesh, abstract=args.costs_only)
    frozen = {name: network.tensors for name, network in networks.items()}
    optimizer = run_optimizer(config.optimizer, config.student, config.steps, mesh)
    step, seconds = compiled_in(lowered(config, mesh, networks, optimizer))
    result: Row = {"row": row, "batch": batch_size, "compile_s": seconds}
    flops = step_flops(step, config, mesh)
    if flops:
        result["tflop"] = flops / 1e12
    if memory := step.memory_analysis():
        result["gb"] = (held_bytes(step) + memory.temp_size_in_bytes) / 1e9
    if args.costs_only:
        return result
    dataset = open_dataset(config.data, config.student.latent_shape)
    (batch,) = first_batches(config, dataset, seed=0, size=batch_size, count=1)
    state, batch = initial_state(config, mesh, optimizer), encoded(to_devices(batch, mesh), None)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return metrics

    time = median_seconds(run, args.repeats)
    result |= {"ms": 1e3 * time, "images_per_s": batch_size / time}
    if flops and (peak := peak_flops(mesh)):
        result["of_peak"] = flops / time / peak
    return result


def count_parts(args: argparse.Namespace, batch_size: int) -> list[Row]:
    """FLOPs of a teacher's forward pass, and of the perceptual loss with its gradient, by themselves."""
    config, mesh = configure(args, "distillation, paper", batch_size), make_mesh(jax.devices()[:1])
    networks = load_frozen(config, mesh, abstract=True)
    teacher, perceptual = networks[TEACHER], networks["perceptual"]
    side = config.student.latent_size

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    def teach(tensors: Any, x: Any, t: Any, ids: Any) -> Any:
        out = teacher.bare(tensors)(x, t, ids)
        return out.sample, out.features[teacher_bottleneck(teacher.bare.config)]

    def perceive(tensors: Any, a: Any, b: Any, keys: Any) -> Any:
        network = perceptual.bare(tensors)
        return jax.value_and_grad(lambda a: config.loss.perceptual.distance(network, a, b, keys).mean())(a)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    latents, ids = array(side, side, 4), array(10, dtype=jnp.int32)
    parts = {
        "teacher, forward": jax.jit(teach).lower(
            teacher.tensors, array(side, side, 9), array(dtype=jnp.int32), ids
        ),
        "perceptual, with gradient": jax.jit(perceive).lower(perceptual.tensors, latents, latents, keys),
    }
    return [
        {"row": name, "batch": batch_size, "tflop": part.compile().cost_analysis()["flops"] / 1e12}
        for name, part in parts.items()
    ]


def main() -> int:
    args = parse()
    rows = told(measure(args, row, size) for size, row in itertools.product(args.batch_sizes, args.rows))
    if args.parts:
        rows += [row for size in args.batch_sizes for row in count_parts(args, size)]
    return report(rows, args)


if __name__ == "__main__":
    sys.exit(main())
