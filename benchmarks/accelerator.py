"""Everything that is claimed of an accelerator, measured on one, beside PyTorch's figures and our model's.

    python -m benchmarks.accelerator --json h200.json                   # what fits into ten minutes
    python -m benchmarks.accelerator --sections training --minutes 9   # compiling the step takes minutes

Sections run in the order given until the time is up; those that were left out are named. Weights are
random and latents made up, which changes no speed.

The comparisons are with one H200: `baseline` is what the released PyTorch code took on it, `x` how many times
faster this is, `model` what `benchmarks.compiled` predicts, `of model` how many times longer it took.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to the processes it starts

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import sample, train
from benchmarks.common import Row, parser, report
from moebius_jax import UNet, UNetConfig
from moebius_jax.models import forms, inference_copy
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.precision import auto_dtype, auto_vae_dtype

TABLE = Path(__file__).parent / "compiled.json"
# PyTorch 2.11 on one H200, ms: a guided step of 1, 8, 32 images (the best of eager, compiled, CUDA graph),
# encoder and decoder in fp32, a whole image as released, a distillation step of 8 and 32 in bfloat16.
STEP = {1: 19.3, 8: 93.3, 32: 396.0}
ENCODE, DECODE, IMAGE = {1: 23.4}, {1: 28.3, 8: 156.0}, {1: 900.0}
TRAINING = {8: 676.0, 32: 2503.0}
PARITY = ("tests/test_vae.py", "tests/test_unet.py", "tests/test_modules.py")


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure, in order")
    add("--minutes", type=float, default=10, help="no section is begun after so long (default 10)")
    add("--dtypes", nargs="+", help="of the steps (default: what the platform samples in, and bfloat16)")
    add("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="images of a step")
    add("--training-batch-sizes", type=int, nargs="+", default=[8, 32])
    args = options.parse_args()
    auto = jnp.dtype(auto_dtype()).name
    args.dtypes = args.dtypes or list(dict.fromkeys([auto, "bfloat16"]))
    return args


def compared(what: str, ms: float, baseline: float | None, model: float | None) -> Row:
    row: Row = {"what": what, "ms": ms}
    if baseline:
        row |= {"baseline": baseline, "x": baseline / ms}
    if model:
        row |= {"model": model, "of model": ms / model}
    return row


def modelled(key: str) -> float | None:
    """The modelled time in the committed table; None where it has none, or this is another device."""
    if "H200" not in jax.devices()[0].device_kind:
        return None
    return json.loads(TABLE.read_text()).get(key, {}).get("total", {}).get("ms")


def steps(args: argparse.Namespace) -> Iterator[Row]:
    """A guided step, in every dtype at every batch size."""
    for dtype in args.dtypes:
        for batch in args.batch_sizes:
            timed = sample.time_batch(_sampling(args, images=False), dtype, batch)
            model = modelled(f"h200, {batch} images, {dtype}: denoising, each step")
            row = compared(f"step, {batch}, {dtype}", timed["ms_per_guided_step"], STEP.get(batch), model)
            yield row | {"compile_s": timed["compile_s"], "peak_gb": timed.get("peak_memory_gb", "")}


def images(args: argparse.Namespace) -> Iterator[Row]:
    """Encoder, decoder, and whole images of 19 steps."""
    vae = jnp.dtype(auto_vae_dtype()).name
    for batch in args.batch_sizes[:2]:
        timed = sample.time_batch(_sampling(args, images=True), args.dtypes[0], batch)
        for part, baseline in (("encode", ENCODE), ("decode", DECODE)):
            model = modelled(f"h200, {batch} images, {vae}: {part}, once")
            yield compared(f"{part}, {batch}, {vae}", timed[f"{part}_ms"], baseline.get(batch), model)
        whole = 1e3 * timed["s_per_batch_of_images"]
        yield compared(f"whole, {batch}", whole, IMAGE.get(batch), None)


def errors(_: argparse.Namespace) -> Iterator[Row]:
    """Distance of the student's predicted noise from fp32's; full size, random weights, L2."""
    off = distance(UNetConfig.student(), noise)
    for dtype, stream in (("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        yield {"what": f"error, {dtype}, stream {stream}", "percent": off(dtype, stream)}


def kernels(_: argparse.Namespace) -> Iterator[Row]:
    """The same with our kernels and without: a larger distance with them would be a kernel's fault."""
    for name, config, measured, dtypes in (
        ("student", UNetConfig.student(), noise, ("float16", "float16")),
        ("teacher", UNetConfig.teacher(), noise, ("float16", "float16")),
        ("student's gradients", UNetConfig.student(remat=True), gradients, ("bfloat16", "float32")),
    ):
        off = distance(config, measured)
        for setting in ("on", "off"):
            with mock.patch.dict(os.environ, {forms.SWITCH: setting}):
                percent = off(*dtypes)
            yield {"what": f"error, {name}, kernels {setting}", "percent": percent}


def distance(config: UNetConfig, measured: Callable[..., np.ndarray]) -> Callable[[str, str], float]:
    """How far, in percent of it, what is measured in a dtype and stream dtype is from fp32's."""
    with jax.default_matmul_precision("highest"):
        exact = measured(config)

    def off(dtype: str, stream_dtype: str) -> float:
        found = measured(config, dtype=dtype, stream_dtype=stream_dtype)
        return 100 * float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    return off


def noise(config: UNetConfig, **dtypes: str) -> np.ndarray:
    """As a network for inference predicts it."""
    unet, inputs = _network(config, **dtypes)
    unet.eval()
    return np.asarray(jax.jit(lambda unet: unet(*inputs).sample)(inference_copy(unet)))


def gradients(config: UNetConfig, **dtypes: str) -> np.ndarray:
    """Of all weights in training, by a loss in which every number of the noise counts otherwise."""
    unet, inputs = _network(config, **dtypes)
    graphdef, params, rest = nnx.split(unet, nnx.Param, ...)
    target = jax.random.normal(jax.random.key(1), (2, 64, 64, 4))

    def loss(params: nnx.State, rest: nnx.State) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graphdef, params, rest, copy=True)(*inputs).sample - target))

    found = jax.jit(jax.grad(loss))(params, rest)
    return np.concatenate([np.ravel(gradient) for gradient in jax.tree.leaves(found)])


def _network(config: UNetConfig, **dtypes: str) -> tuple[UNet, tuple[jax.Array, ...]]:
    key = jax.random.key(0)
    unet = UNet(config, rngs=KeyStream(key), **{k: jnp.dtype(v) for k, v in dtypes.items()})
    latents = jax.random.normal(key, (2, 64, 64, 9))
    return unet, (latents, jnp.array([900, 30]), jnp.tile(jnp.arange(10)[None], (2, 1)))


def training(args: argparse.Namespace) -> Iterator[Row]:
    """A whole distillation step."""
    options = argparse.Namespace(
        sizes="full",
        dtype="bfloat16",
        stream_dtype="float32",
        remat=False,
        costs_only=False,
        repeats=args.repeats,
    )
    for batch in args.training_batch_sizes:
        timed = train.measure(options, "distillation, paper", batch)
        model = modelled(f"h200, {batch} images, bfloat16+float32: full, distillation, paper, once")
        row = compared(f"distillation, {batch}", timed["ms"], TRAINING.get(batch), model)
        yield row | {key: timed[key] for key in ("compile_s", "gb", "images_per_s")}


def mixers(_: argparse.Namespace) -> Iterator[Row]:
    """The table of `benchmarks.mixers`, by a process of its own."""
    yield _command("mixers", "benchmarks.mixers", "--dtype", "bfloat16", "--batch", "16")


def parity(_: argparse.Namespace) -> Iterator[Row]:
    """The tests against the release's vectors, on this device, except those that interpret kernels."""
    yield _command("parity", "pytest", "-q", "-x", "-k", "not forms and not sharded", *PARITY)


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    part.__name__: part for part in (steps, errors, images, parity, kernels, training, mixers)
}


def _sampling(args: argparse.Namespace, *, images: bool) -> argparse.Namespace:
    return argparse.Namespace(
        stream_dtype=None,
        vae_dtype=None,
        position_order="auto",
        steps=sample.FULL_RUN,
        no_images=not images,
        repeats=args.repeats,
    )


def _command(what: str, module: str, *arguments: str) -> Row:
    """Runs a module and shows what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    print(done.stdout + done.stderr[-2000:], file=sys.stderr)
    last = (done.stdout.strip().splitlines() or ["nothing printed"])[-1]
    return {"what": what, "status": done.returncode, "said": last}


def main() -> int:
    args = parse()
    started, rows = time.perf_counter(), []
    for name in args.sections:
        if time.perf_counter() - started > 60 * args.minutes:
            rows.append({"what": name, "said": "left out, the time is up"})
            continue
        for row in SECTIONS[name](args):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    return report(rows, args)


if __name__ == "__main__":
    sys.exit(main())
