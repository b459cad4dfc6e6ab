"""The student and the VAE beside the same layers in PyTorch, on this machine's CPU, same weights and input.

    python -m benchmarks.pytorch                        # all, of random weights: minutes
    python -m benchmarks.pytorch --only half --unet DIR     # of converted ones

`half`: how far half precision takes the predicted noise from float32. PyTorch's is rounded after every
operation, sums kept in float32, as its GPU kernels do (a CPU without half-precision arithmetic takes minutes
to say the same). Ours may be no further off.

`speed`: one denoising call of two samples (a guided step), all of them in turns, at equal threads. Compiling
PyTorch's needs a C++ compiler.

`vae`: encoder and decoder on one image of 512 x 512 pixels, likewise; how far apart their results are, too.

Needs the `dev` extra.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks import pytorch_vae
from benchmarks.common import Row, parser, report, told
from benchmarks.pytorch_student import Student
from moebius_jax import UNet, UNetConfig
from moebius_jax.models import VAE, VAEConfig, inference_copy
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.vae import Posterior
from moebius_jax.weights.load import load_unet
from moebius_jax.weights.names import expected_tensors
from moebius_jax.weights.tensors import network_tensors

Call = Callable[..., np.ndarray]  # of NHWC arrays, one too
Build = Callable[[str], UNet]  # the student computing in this dtype


class RoundedAfterEveryOperation(TorchDispatchMode):
    """While it lasts, operations on numbers of a half-precision dtype are done in float32, then rounded."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(
        self,
        operation: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_cast = operation is torch.ops.aten._to_copy.default
        if is_cast or not any(x.dtype == self.dtype for x in tensors):
            return operation(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(torch.Tensor, self._wide, (args, dict(kwargs or {})))
        return tree_map_only(torch.Tensor, self._rounded, operation(*args, **kwargs))

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() if x.dtype == self.dtype else x

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype) if x.dtype == torch.float32 else x


def inputs(config: UNetConfig, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents [B, H, W, 9], timesteps [B], category ids [B, L]."""
    rng = np.random.default_rng(0)
    side = config.latent_size
    latents = rng.standard_normal((batch, side, side, config.in_channels), np.float32)
    ids = np.broadcast_to(config.category_ids[0], (batch, config.context_length))
    return latents, np.full(batch, 500, np.int32), ids


def in_pytorch(network: UNet | VAE) -> Module:
    """The same network in PyTorch, with its weights."""
    tensors = {name: np.asarray(value) for name, value in network_tensors(network).items()}
    state = {
        name: torch.from_numpy(np.array(slot.layout.to_torch(tensors[slot.path])))
        for name, slot in expected_tensors(network.config).items()
    }
    module = pytorch_vae.VAE() if isinstance(network, VAE) else Student(network.config.latent_size)
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise RuntimeError(f"not the network's layers: {missing}, {unexpected}")
    return module.eval()


def torch_call(module: Callable[..., torch.Tensor], dtype: torch.dtype = torch.float32) -> Call:
    """A PyTorch function of a map [B, C, H, W] and more, as one of NHWC arrays."""

    @torch.no_grad()
    def call(x: np.ndarray, *more: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(x).movedim(-1, 1).contiguous().to(dtype)
        y = module(x, *(torch.from_numpy(np.array(a)) for a in more))
        return y.float().movedim(1, -1).numpy()

    return call


def jax_call(network: UNet) -> Call:
    graphdef, weights = nnx.split(inference_copy(network))
    program = jax.jit(lambda weights, *args: nnx.merge(graphdef, weights)(*args).sample)
    return lambda *args: np.asarray(program(weights, *args), np.float32)


def half(build: Build) -> list[Row]:
    """Relative L2 error of each, against PyTorch's float32."""
    network = build("float32")
    args = inputs(network.config, 1)
    student = in_pytorch(network)
    exact = torch_call(student)(*args)

    def row(what: str, dtype: str, noise: np.ndarray) -> Row:
        error = np.linalg.norm(noise - exact) / np.linalg.norm(exact)
        return {"what": what, "dtype": dtype, "error": float(error)}

    def rows() -> Any:
        yield row("JAX", "float32", jax_call(network)(*args))
        for dtype in (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            yield row("JAX", name, jax_call(build(name))(*args))
            with RoundedAfterEveryOperation(dtype):
                yield row("PyTorch", name, torch_call(in_pytorch(network).to(dtype), dtype)(*args))

    return told(rows())


def speed(build: Build, repeats: int) -> list[Row]:
    """Median wall and processor seconds of a guided step's call, in float32."""
    network = build("float32")
    args = inputs(network.config, 2)
    student = in_pytorch(network)
    calls = {
        "PyTorch": torch_call(student),
        "PyTorch, torch.compile": torch_call(torch.compile(student)),
        "JAX": jax_call(network),
    }
    return in_turns(calls, args, repeats)


def vae(repeats: int) -> list[Row]:
    """The same of the released VAE's halves, in float32."""
    network = VAE(VAEConfig(), rngs=KeyStream(jax.random.key(0)))
    network.eval()
    theirs = in_pytorch(network)
    graphdef, weights = nnx.split(inference_copy(network))
    random = np.random.default_rng(0)
    image = random.uniform(-1, 1, (1, 512, 512, 3)).astype(np.float32)
    latents = random.standard_normal((1, 64, 64, 4), np.float32)
    halves = {
        "encoder": (theirs.encode, lambda vae, x: _moments(vae.posterior(x)), image),
        "decoder": (theirs.decode, lambda vae, x: vae.decode(vae.scaled(x)), latents),
    }
    rows = []
    for name, (module, method, x) in halves.items():
        program = jax.jit(lambda weights, x, method=method: method(nnx.merge(graphdef, weights), x))
        calls = {
            "PyTorch": torch_call(module),
            "PyTorch, torch.compile": torch_call(torch.compile(module)),
            "JAX": lambda x, program=program: np.asarray(program(weights, x)),
        }
        exact = calls["PyTorch"](x)
        error = float(np.abs(calls["JAX"](x) - exact).max() / np.abs(exact).max())
        rows += [{"half": name, **row, "error": error} for row in in_turns(calls, (x,), repeats)]
    return rows


def _moments(posterior: Posterior) -> jax.Array:
    return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)


def in_turns(calls: Mapping[str, Call], args: tuple[np.ndarray, ...], repeats: int) -> list[Row]:
    """Median wall and processor seconds of calls that do the same, "JAX" among them."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call(*args)  # compiles
    for _ in range(repeats):
        for name, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            call(*args)
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    medians = {
        name: [statistics.median(column) for column in zip(*t, strict=True)] for name, t in times.items()
    }
    ours = medians["JAX"]
    return [
        {"what": name, "wall s": wall, "processor s": processor, "JAX takes, of it": ours[1] / processor}
        for name, (wall, processor) in medians.items()
    ]


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--only", choices=("half", "speed", "vae"))
    options.add_argument("--unet", metavar="DIR", help="a converted student (default: random weights)")
    return options.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(os.cpu_count())

    def build(dtype: str) -> UNet:
        dtypes = {"dtype": jnp.dtype(dtype), "stream_dtype": jnp.dtype(dtype)}
        if args.unet:
            return load_unet(args.unet, param_dtype=jnp.float32, **dtypes)
        network = UNet(UNetConfig.student(), rngs=KeyStream(jax.random.key(0)), **dtypes)
        network.eval()
        return network

    studies = {
        "half": lambda: half(build),
        "speed": lambda: speed(build, args.repeats),
        "vae": lambda: vae(args.repeats),
    }
    rows = [row for name, study in studies.items() if args.only in (None, name) for row in study()]
    return report(rows, args)


if __name__ == "__main__":
    sys.exit(main())
