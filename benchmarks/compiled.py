"""What a program costs on an accelerator, counted without one: kernels, bytes, FLOPs and a modelled time.

    python -m benchmarks.compiled --target h200                  # one guided step of one image
    python -m benchmarks.compiled --target v5e --batch-size 8
    python -m benchmarks.compiled --target h200 --vae            # encoder and decoder
    python -m benchmarks.compiled --target h200 --train --batch-size 8          # a distillation step
    python -m benchmarks.compiled --target h200 --save           # make this the table to compare with

NVIDIA's and Google's compilers run on a plain x86 Linux machine. The program is compiled for a described
device and its optimised form is read. Times are a model, not a measurement: on an H200 each kernel takes
max(2 us, bytes / 4.3 TB/s, FLOPs / 60 % of peak); on TPUs what the compiler estimates or, for kernels of
ours, the length of its schedule and at least bytes / bandwidth. Forms of Local-λ that were timed on an
H200, before this code, took 2 to 4 times as long as it says: it ranks changes and is no speed.

For a CPU, kernels and bytes are counted and no time is modelled.

Needs an environment with `jax[cuda12]` (h200) or `libtpu` (v5e, v6e): see benchmarks/README.md.
"""

import argparse
import collections
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import hlo, mosaic
from benchmarks.common import wrapped_calls
from benchmarks.programs import core, core_inputs, placed
from benchmarks.train import ROWS, SIZES, abstract_step, configure
from moebius_jax.cli.terminal import run
from moebius_jax.diffusion.denoise import inpaint_latents
from moebius_jax.errors import UserError
from moebius_jax.hardware import compile_and_read, slice_devices
from moebius_jax.inpaint.latents import decode, encode
from moebius_jax.models import VAE, VAEConfig, inference_copy
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.precision import auto_dtype, auto_vae_dtype
from moebius_jax.sharding import make_mesh, replicated, with_mesh
from moebius_jax.weights.tensors import abstract_network

HERE = Path(__file__).parent
TABLE = HERE / "compiled.json"
PLATFORM = {"h200": "gpu", "v5e": "tpu", "v6e": "tpu", "cpu": "cpu"}
SLICES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
LAUNCH = 2e-6  # seconds a kernel takes however little it does
BANDWIDTH = 4.3e12  # measured on an H200, before this code, as are the 790 TFLOP/s of half precision
FLOP_RATES = {"f16": 0.6 * 790e12, "bf16": 0.6 * 790e12, "tf32": 0.6 * 395e12}
SLOW_FLOPS = 0.7 * 60e12  # fp32 multiply-adds

Group = dict[str, float]


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--target", choices=list(PLATFORM), required=True)
    add("--batch-size", type=int, default=1, help="images; guidance makes two network inputs of each")
    add("--dtype", help="of the network; by default what the target samples in")
    add("--stream-dtype", help="by default as --dtype")
    add("--vae", action="store_true", help="encoder and decoder instead of the denoising loop")
    add("--train", action="store_true", help="a distillation step of --batch-size samples instead")
    add("--sizes", choices=SIZES, default="reduced", help="of its networks (default reduced)")
    add("--row", choices=ROWS, default="distillation, paper", help="what the step consists of")
    add("--remat", action="store_true", help="compute activations again in its backward pass")
    add("--hlo", type=Path, metavar="FILE", help="also write the compiled program here")
    add("--largest", type=int, default=0, metavar="N", help="also list the N longest kernels")
    add("--save", action="store_true", help=f"put the result into {TABLE.name}")
    return options.parse_args()


def device_for(target: str) -> jax.Device:
    """A device that can be compiled for and not run on."""
    if target == "cpu":
        return jax.devices("cpu")[0]
    if target in SLICES:
        return slice_devices(SLICES[target])[0]
    description = (HERE / "targets" / f"{target}.txtpb").read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=description)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--target {target}: no CUDA compiler here ({error}); it needs jax[cuda12], see "
            "benchmarks/README.md"
        ) from None
    return topology.devices[0]


def scoped(call: Callable[..., Any]) -> Callable[..., Any]:
    """What a module traces carries its class's name."""

    @functools.wraps(call)
    def named(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(type(self).__name__):
            return call(self, *args, **kwargs)

    return named


def loop_program(args: argparse.Namespace, mesh: Mesh) -> tuple[Any, frozenset[str]]:
    """The denoising loop of the full student, lowered, and the names of its modules' classes."""
    graphdef, params = core(args.dtype, args.stream_dtype, PLATFORM[args.target])
    inputs = jax.eval_shape(lambda: core_inputs(args.batch_size, 20))
    arguments = placed((params, *inputs), replicated(mesh))
    unet = nnx.merge(graphdef, params)
    names = {type(module).__name__ for _, module in nnx.iter_modules(unet)} - {"UNet"}
    with wrapped_calls(unet, scoped):
        lowered = with_mesh(inpaint_latents.lower, mesh)(graphdef, *arguments, guided=True)
    return lowered, frozenset(names)


def vae_programs(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Encoder and decoder of 512 px images, lowered when called."""
    config, place = VAEConfig(platform=PLATFORM[args.target]), replicated(mesh)
    build = functools.partial(VAE, config, dtype=jnp.dtype(args.dtype))
    vae = nnx.eval_shape(lambda: inference_copy(build(rngs=KeyStream(jax.random.key(0)))))
    vae = placed(vae, place)
    B, shape = args.batch_size, jax.ShapeDtypeStruct
    noise, images, holes = placed(
        (
            shape((B, 64, 64, 4), jnp.float32),
            shape((B, 512, 512, 3), jnp.uint8),
            shape((B, 512, 512), bool),
        ),
        place,
    )
    return {
        "encode": lambda: with_mesh(encode.lower, mesh)(vae, images, holes, noise, noise),
        "decode": lambda: with_mesh(decode.lower, mesh)(vae, noise, truncate=False),
    }


def train_program(args: argparse.Namespace, mesh: Mesh) -> tuple[Any, frozenset[str]]:
    """A distillation step, lowered, and the names of its networks' modules."""
    config = configure(args, args.row, args.batch_size, PLATFORM[args.target])
    student = abstract_network(config.student)
    names = {type(module).__name__ for _, module in nnx.iter_modules(student)} - {"UNet"}
    with wrapped_calls(student, scoped):
        return abstract_step(config, mesh), frozenset(names)


def seconds(kernel: hlo.Kernel, target: str) -> float:
    """Modelled time of one kernel; none for a CPU."""
    if target == "cpu":
        return 0.0
    if target in mosaic.CLOCK:
        return kernel.cycles / mosaic.CLOCK[target]
    arithmetic = sum(count / FLOP_RATES.get(unit, SLOW_FLOPS) for unit, count in kernel.flops.items())
    return max(LAUNCH, (kernel.read + kernel.written) / BANDWIDTH, arithmetic)


def grouped(kernels: list[hlo.Kernel], modules: frozenset[str], target: str) -> dict[str, Group]:
    """Figures by module, "total" first and then from the longest down."""
    groups: dict[str, Group] = collections.defaultdict(
        lambda: {"kernels": 0, "gb": 0.0, "gflop": 0.0, "ms": 0.0}
    )
    for kernel in kernels:
        for name in ("total", hlo.module_of(kernel.instruction.scope, modules)):
            group = groups[name]
            group["kernels"] += 1
            group["gb"] += (kernel.read + kernel.written) / 1e9
            group["gflop"] += sum(kernel.flops.values()) / 1e9
            group["ms"] += 1e3 * seconds(kernel, target)
    return dict(sorted(groups.items(), key=lambda item: (item[0] != "total", -item[1]["ms"])))


def counted(
    name: str, lowered: Any, modules: frozenset[str], args: argparse.Namespace, schedules: Path
) -> dict[str, dict[str, Group]]:
    """Compiles a program and counts what it does at every turn of its loop, and once.

    `schedules` is the folder that a TPU's compiler writes schedules to.
    """
    compiled, text = compile_and_read(lowered)
    if args.hlo:
        args.hlo.write_text(text)
    kernels = hlo.kernels(text)
    if args.target in mosaic.CLOCK:
        kernels = mosaic.scheduled(kernels, schedules, args.target)
    for kernel in sorted(kernels, key=lambda k: -seconds(k, args.target))[: args.largest]:
        made, moved = kernel.instruction, kernel.read + kernel.written
        print(
            f"{1e6 * seconds(kernel, args.target):8.1f} us {moved / 1e6:7.1f} MB "
            f"{sum(kernel.flops.values()) / 1e9:6.1f} GF {'x' if kernel.in_loop else ' '} {made.op:11s} "
            f"{hlo.module_of(made.scope, modules):40s} {made.scope[-60:]}"
        )
    memory = compiled.memory_analysis().temp_size_in_bytes / 1e9
    units = collections.Counter()
    for kernel in kernels:
        units.update(kernel.flops)
    print(
        f"{name}: temporaries {memory:.2f} GB, GFLOP " + str({u: round(n / 1e9, 1) for u, n in units.items()})
    )
    parts = {
        f"{name}, each step": [k for k in kernels if k.in_loop],
        f"{name}, once": [k for k in kernels if not k.in_loop],
    }
    return {part: grouped(list_, modules, args.target) for part, list_ in parts.items() if list_}


def show(title: str, groups: dict[str, Group], before: dict[str, Group]) -> None:
    """A table, each figure with the committed one behind it where they differ."""
    print(f"\n{title}\n\n| module | kernels | GB | GFLOP | ms |\n|---|---|---|---|---|")
    for name, group in groups.items():
        cells = []
        for key, digits in (("kernels", 0), ("gb", 3), ("gflop", 1), ("ms", 3)):
            now = f"{group[key]:.{digits}f}"
            then = f"{before.get(name, {}).get(key, 0):.{digits}f}"
            cells.append(now if now == then or not before else f"{now} (was {then})")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as schedules:
        return run(lambda: count(args, Path(schedules)))


def count(args: argparse.Namespace, schedules: Path) -> int:
    """Compiles what the arguments name, counts and shows it."""
    if args.target in mosaic.CLOCK:
        mosaic.write_schedules(schedules)
    auto = auto_vae_dtype if args.vae else auto_dtype
    if args.train:
        args.dtype, args.stream_dtype = args.dtype or "bfloat16", args.stream_dtype or "float32"
    args.dtype = args.dtype or jnp.dtype(auto(PLATFORM[args.target])).name
    mesh = make_mesh([device_for(args.target)])
    results: dict[str, dict[str, Group]] = {}
    if args.vae:
        for name, lower in vae_programs(args, mesh).items():
            results |= counted(name, lower(), frozenset(), args, schedules)
    elif args.train:
        name = f"{args.sizes}, {args.row}{', remat' if args.remat else ''}"
        results |= counted(name, *train_program(args, mesh), args, schedules)
    else:
        results |= counted("denoising", *loop_program(args, mesh), args, schedules)
    committed = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    dtypes = args.dtype if args.stream_dtype in (None, args.dtype) else f"{args.dtype}+{args.stream_dtype}"
    for part, groups in results.items():
        key = f"{args.target}, {args.batch_size} images, {dtypes}: {part}"
        show(key, groups, committed.get(key, {}))
        committed[key] = {n: {k: round(v, 4) for k, v in g.items()} for n, g in groups.items()}
    if args.save:
        TABLE.write_text(json.dumps(dict(sorted(committed.items())), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
