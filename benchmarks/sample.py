"""Speed of sampling: one command, a table and JSON.

    python -m benchmarks.sample                             # this machine's accelerator, or its CPU
    python -m benchmarks.sample --batch-sizes 1 --steps 2 --dtypes float32    # something quick
    python -m benchmarks.sample --aot v5e:2x4               # compile for a TPU slice, without one

For each dtype and batch size it times the guided denoising step (two U-Net samples per image), encoder and
decoder, and the whole 512 px image, and reports XLA's FLOP count, the share of the device's peak, peak memory
and compile time. Weights are random: speed does not depend on them.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks import hlo
from benchmarks.common import Row, compiled_in, median_seconds, parser, read_in, report, told
from benchmarks.programs import core, core_inputs, placed
from moebius_jax.diffusion.denoise import inpaint_latents, single_step
from moebius_jax.hardware import PEAKS, slice_devices
from moebius_jax.inpaint.latents import decode, encode
from moebius_jax.models import VAE, VAEConfig, inference_copy
from moebius_jax.models.forms import platform_of
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.precision import auto_dtype, auto_vae_dtype
from moebius_jax.sharding import batch_sharding, make_mesh, replicated, with_mesh

FULL_RUN = 19  # steps at 20 inference steps and strength 0.99


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    add("--dtypes", nargs="+", help="of the U-Net (default: what the platform samples in, and float32)")
    add("--stream-dtype", help="see moebius_jax.models.precision (default: as the dtype)")
    add("--vae-dtype", help="of the VAE (default: what the platform samples in)")
    add("--position-order", default="auto")
    add("--steps", type=int, default=FULL_RUN, help="denoising steps of the timed loop")
    add("--no-images", action="store_true", help="time the step only, without VAE and whole image")
    add("--aot", metavar="TOPOLOGY", help="compile for a TPU topology (v5e:2x4) and report costs")
    return options.parse_args()


def time_batch(args: argparse.Namespace, dtype: str, batch: int) -> Row:
    """All figures of one dtype and batch size on the default device."""
    graphdef, shapes = core(dtype, args.stream_dtype, None, args.position_order)
    # Small random weights: zeros would let nothing overflow but also nothing happen.
    params = jax.tree.map(lambda a: 0.02 * jax.random.normal(jax.random.key(0), a.shape, a.dtype), shapes)
    inputs = core_inputs(batch, args.steps)
    compiled, seconds = compiled_in(inpaint_latents.lower(graphdef, params, *inputs, guided=True))
    step = median_seconds(lambda: compiled(params, *inputs), args.repeats) / args.steps
    flops = step_flops(graphdef, params, batch)
    row = {
        "dtype": dtype,
        "batch": batch,
        "ms_per_guided_step": 1e3 * step,
        "ms_per_guided_step_and_image": 1e3 * step / batch,
        "gflop_per_step": flops / 1e9,
        "compile_s": seconds,
    }
    if dtype != "float32" and (peak := PEAKS.get(jax.devices()[0].device_kind)):
        row["share_of_peak"] = flops / step / peak[0]
    if memory := compiled.memory_analysis():
        row["core_temporaries_gb"] = memory.temp_size_in_bytes / 1e9
    if not args.no_images:
        row |= time_images(args, batch, step * FULL_RUN)
    if stats := jax.devices()[0].memory_stats():
        row["peak_memory_gb"] = stats.get("peak_bytes_in_use", 0) / 1e9
    return row


def step_flops(graphdef: Any, params: Any, batch: int) -> float:
    """XLA's count for one guided step (XLA counts a loop's body once, whatever its length)."""
    latents, mask, masked, _, table, scale, _ = core_inputs(batch, 20)
    lowered = single_step.lower(
        graphdef, params, latents, latents, mask, masked, table.at_step(0), scale, guided=True
    )
    return float((lowered.compile().cost_analysis() or {}).get("flops", float("nan")))


def time_images(args: argparse.Namespace, batch: int, loop: float) -> Row:
    """Encoder and decoder of the released VAE, and the whole image together with the loop."""
    vae = VAE(
        VAEConfig(), dtype=jnp.dtype(args.vae_dtype or auto_vae_dtype()), rngs=KeyStream(jax.random.key(0))
    )
    vae = inference_copy(vae)
    images, holes = jnp.zeros((batch, 512, 512, 3), jnp.uint8), jnp.zeros((batch, 512, 512), bool)
    noise = jax.random.normal(jax.random.key(0), (batch, 64, 64, 4))
    encoding = median_seconds(lambda: encode(vae, images, holes, noise, noise), args.repeats)
    decoding = median_seconds(lambda: decode(vae, noise), args.repeats)
    whole = loop + encoding + decoding
    return {
        "encode_ms": 1e3 * encoding,
        "decode_ms": 1e3 * decoding,
        "s_per_batch_of_images": whole,
        "images_per_s": batch / whole,
    }


def compile_for(mesh: Mesh, args: argparse.Namespace, dtype: str, batch: int) -> Row:
    """Costs of the core compiled for a TPU topology, the batch sharded over all its devices."""
    graphdef, params = core(dtype, args.stream_dtype, platform_of(mesh.devices.flat[0]), args.position_order)
    inputs = jax.eval_shape(lambda: core_inputs(batch * mesh.size, args.steps))
    arguments = placed(params, replicated(mesh)), *placed(inputs[:4], batch_sharding(mesh))
    arguments += placed(inputs[4:], replicated(mesh))
    lower = with_mesh(inpaint_latents.lower, mesh)
    compiled, text, seconds = read_in(lower(graphdef, *arguments, guided=True))
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    peak_flops, peak_bytes = PEAKS[mesh.devices.flat[0].device_kind]
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
        "collectives": sum(count for count, _ in hlo.collectives(text).values()),
        "compile_s": seconds,
    }


def main() -> int:
    args = parse()
    args.dtypes = args.dtypes or [jnp.dtype(auto_dtype("tpu" if args.aot else None)).name, "float32"]
    cases = [(dtype, batch) for dtype in args.dtypes for batch in args.batch_sizes]
    if not args.aot:
        return report(told(time_batch(args, *case) for case in cases), args)
    mesh = make_mesh(slice_devices(args.aot))
    rows = told(compile_for(mesh, args, *case) for case in cases)
    return report(rows, args, device=f"compiled for {args.aot}")


if __name__ == "__main__":
    sys.exit(main())
