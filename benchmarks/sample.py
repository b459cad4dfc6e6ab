"""Speed of sampling: one command, a table and JSON.

    python benchmarks/sample.py                                  # this machine's accelerator, or its CPU
    python benchmarks/sample.py --batch-sizes 1 --steps 2 --dtypes float32       # something quick
    python benchmarks/sample.py --aot v5e:2x4                    # compile for a TPU slice, without one

For each dtype and batch size it times the guided denoising step (two U-Net samples per image), encoder and
decoder, and the whole 512 px image, and reports XLA's FLOP count, the share of the device's peak, peak memory
and compile time. Weights are random: speed does not depend on them.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moebius_jax.hardware import PEAKS

FULL_RUN = 19  # steps at 20 inference steps and strength 0.99


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of the U-Net")
    parser.add_argument("--stream-dtype", default="float32", help="see moebius_jax.models.precision")
    parser.add_argument("--vae-dtype", default="float32")
    parser.add_argument("--position-order", default="auto")
    parser.add_argument("--steps", type=int, default=FULL_RUN, help="denoising steps of the timed loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--no-images", action="store_true", help="time the step only, without VAE and whole image"
    )
    parser.add_argument(
        "--aot", metavar="TOPOLOGY", help="compile for a TPU topology (v5e:2x4) and report costs"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call that is already compiled."""
    import jax

    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def abstract_core(args: argparse.Namespace, dtype: str, platform: str | None) -> tuple[Any, Any]:
    """Graph and abstract weights of the folded full-size student."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from moebius_jax import UNet, UNetConfig
    from moebius_jax.models import inference_copy
    from moebius_jax.models.initializers import KeyStream

    config = UNetConfig.student(position_order=args.position_order, platform=platform)

    def build() -> UNet:
        unet = UNet(
            config,
            dtype=jnp.dtype(dtype),
            stream_dtype=jnp.dtype(args.stream_dtype),
            rngs=KeyStream(jax.random.key(0)),
        )
        return inference_copy(unet)

    return nnx.split(nnx.eval_shape(build))


def core_arguments(batch: int, steps: int) -> tuple[Any, ...]:
    """Inputs of the core after its weights, as shapes."""
    import jax
    import jax.numpy as jnp

    from moebius_jax.diffusion.solvers import solver_steps

    def latents(channels: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, 64, 64, channels), jnp.float32)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    table = jax.eval_shape(lambda: solver_steps("ddim", steps, 1.0))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return latents(4), latents(1), latents(4), keys, table, scalar, scalar


def time_batch(args: argparse.Namespace, dtype: str, batch: int) -> dict[str, Any]:
    """All figures of one dtype and batch size on the default device."""
    import jax
    import jax.numpy as jnp

    from moebius_jax.diffusion.denoise import inpaint_latents
    from moebius_jax.diffusion.solvers import solver_steps

    graphdef, abstract = abstract_core(args, dtype, None)
    # Small random weights: zeros would let nothing overflow but also nothing happen.
    key = jax.random.key(0)
    params = jax.tree.map(lambda a: 0.02 * jax.random.normal(key, a.shape, a.dtype), abstract)
    latents = jax.random.normal(key, (batch, 64, 64, 4))
    mask = jnp.ones((batch, 64, 64, 1))
    inputs = (params, latents, mask, latents, jax.random.split(key, batch))
    scalars = (jnp.float32(2.5), jnp.float32(0.0357))

    start = time.perf_counter()
    lowered = inpaint_latents.lower(
        graphdef, *inputs, solver_steps("ddim", args.steps, 1.0), *scalars, guided=True
    )
    tracing = time.perf_counter() - start
    compiled = lowered.compile()
    compile_time = time.perf_counter() - start

    def run() -> jax.Array:
        return compiled(*inputs, solver_steps("ddim", args.steps, 1.0), *scalars)

    jax.block_until_ready(run())
    loop = seconds(run, args.repeats)
    result = {
        "dtype": dtype,
        "batch": batch,
        "ms_per_guided_step": 1e3 * loop / args.steps,
        "ms_per_guided_step_and_image": 1e3 * loop / args.steps / batch,
        "gflop_per_step": step_flops(graphdef, params, batch) / 1e9,
        "compile_s": compile_time,
        "of_which_tracing_s": tracing,
    }
    if dtype == "bfloat16" and (peak := PEAKS.get(jax.devices()[0].device_kind)):
        result["share_of_peak"] = result["gflop_per_step"] * 1e9 / (loop / args.steps) / peak[0]
    if memory := compiled.memory_analysis():
        result["core_temporaries_gb"] = memory.temp_size_in_bytes / 1e9
    if not args.no_images:
        result |= time_images(args, batch, loop * FULL_RUN / args.steps)
    if stats := jax.devices()[0].memory_stats():
        result["peak_memory_gb"] = stats.get("peak_bytes_in_use", 0) / 1e9
    return result


def step_flops(graphdef: Any, params: Any, batch: int) -> float:
    """XLA's count for one guided step (XLA counts a loop's body once, whatever its length)."""
    import jax.numpy as jnp

    from moebius_jax.diffusion.denoise import single_step
    from moebius_jax.diffusion.solvers import solver_steps

    latents = jnp.zeros((batch, 64, 64, 4))
    step = solver_steps("ddim", 20).at_step(0)
    lowered = single_step.lower(
        graphdef, params, latents, latents, latents[..., :1], latents, step, jnp.float32(2.5), guided=True
    )
    analysis = lowered.compile().cost_analysis() or {}
    return float(analysis.get("flops", float("nan")))


def time_images(args: argparse.Namespace, batch: int, loop: float) -> dict[str, float]:
    """Encoder and decoder of the released VAE, and the whole image together with the loop."""
    import jax
    import jax.numpy as jnp

    from moebius_jax.inpaint.latents import decode, encode
    from moebius_jax.models import VAE, VAEConfig
    from moebius_jax.models import vae as vae_model

    config = VAEConfig()
    vae = VAE(
        params=jax.jit(vae_model.init_params, static_argnums=0)(config, jax.random.key(0)),
        config=config,
        dtype=jnp.dtype(args.vae_dtype),
    )
    images = jnp.zeros((batch, 512, 512, 3), jnp.uint8)
    holes = jnp.zeros((batch, 512, 512), bool)
    noise = jax.random.normal(jax.random.key(0), (batch, 64, 64, 4))
    calls = {
        "encode_ms": lambda: encode(vae, images, holes, noise, noise),
        "decode_ms": lambda: decode(vae, noise, truncate=False),
    }
    result = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        result[name] = 1e3 * seconds(call, args.repeats)
    whole = loop + sum(result.values()) / 1e3
    return {**result, "s_per_batch_of_images": whole, "images_per_s": batch / whole}


def compile_for(args: argparse.Namespace, dtype: str, batch: int) -> dict[str, Any]:
    """Costs of the core compiled for a TPU topology, the batch sharded over all its devices."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from moebius_jax.diffusion.denoise import inpaint_latents
    from moebius_jax.inpaint.sampler import data_mesh

    topology = topologies.get_topology_desc(platform="tpu", topology_name=args.aot)
    mesh = data_mesh(list(topology.devices))
    graphdef, params = abstract_core(args, dtype, "tpu")
    global_batch = batch * mesh.size

    def placed(tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    replicated, data = PartitionSpec(), PartitionSpec("data")
    *batched, table, scale, offset = core_arguments(global_batch, args.steps)
    inputs = [placed(x, data) for x in batched] + [placed(x, replicated) for x in (table, scale, offset)]
    start = time.perf_counter()
    compiled = inpaint_latents.lower(graphdef, placed(params, replicated), *inputs, guided=True).compile()
    elapsed = time.perf_counter() - start
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    peak_flops, peak_bytes = PEAKS[mesh.devices.flat[0].device_kind]
    text = compiled.as_text()
    # XLA counts the body of the loop once: these are one step's figures, on one device.
    return {
        "topology": args.aot,
        "dtype": dtype,
        "images_per_device": batch,
        "gflop_per_step": cost["flops"] / 1e9,
        "hbm_gb_per_step": cost["bytes accessed"] / 1e9,
        "bound_ms": 1e3 * max(cost["flops"] / peak_flops, cost["bytes accessed"] / peak_bytes),
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "collectives": sum(
            text.count(f" {c}(") for c in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        ),
        "compile_s": elapsed,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [f"{v:.4g}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns] for row in rows
    ]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for line in cells:
        print("| " + " | ".join(line) + " |")


def main() -> int:
    args = parse()
    if args.aot:
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    import jax

    measure = compile_for if args.aot else time_batch
    rows = []
    for dtype in args.dtypes:
        for batch in args.batch_sizes:
            rows.append(measure(args, dtype, batch))
            print(json.dumps(rows[-1]), file=sys.stderr)
    device = (
        f"compiled for {args.aot}" if args.aot else f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, jax {jax.__version__}, {device}\n")
    print_table(rows)
    if args.json:
        args.json.write_text(
            json.dumps({"device": device, "jax": jax.__version__, "rows": rows}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
