"""Compiling a run's step for a TPU slice on a machine without one: what it needs, before anybody books it."""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moebius_jax.buckets import is_bucket
from moebius_jax.data.datasets import DATASETS
from moebius_jax.data.samples import PixelSample
from moebius_jax.errors import UserError, first_line
from moebius_jax.hardware import compile_and_read, held_bytes, slice_devices
from moebius_jax.models import UNetConfig
from moebius_jax.models.architecture import Architecture
from moebius_jax.models.forms import platform_of
from moebius_jax.sharding import make_mesh
from moebius_jax.training.batches import abstract_batch, check_batch
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.networks import load_frozen
from moebius_jax.training.optimizer import run_optimizer
from moebius_jax.training.state import abstract_state

HBM_GB = {"TPU v5 lite": 16, "TPU v5e": 16, "TPU v4": 32, "TPU v5": 95, "TPU v6 lite": 32}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def report_aot(config: TrainConfig, topology: str, make_update: Callable[..., Any]) -> str:
    """Memory, FLOPs, HBM traffic and collectives per device of the real step, as a table.

    The process must not have started jax's devices yet. Converted folders need not be there: published
    architectures stand in for missing ones, and the report says so.

    Args:
        config: of the run.
        topology: a TPU slice as libtpu names it, "v5e:4x8".
        make_update: the step, see `train.py`.

    Raises:
        UserError: no libtpu, no such topology, or the program does not fit the device.
    """
    devices = slice_devices(topology)
    notes, config = _stand_ins(config)
    config = config.replace(student=config.student.replace(platform=platform_of(devices[0])))
    mesh = make_mesh(devices, fsdp=config.fsdp)
    check_batch(config, mesh)
    networks = load_frozen(config, mesh, abstract=True)
    optimizer = run_optimizer(config.optimizer, config.student, config.steps, mesh)
    arguments = (
        abstract_state(config, mesh, optimizer),
        {name: network.tensors for name, network in networks.items()},
        abstract_batch(config, mesh),
    )
    started = time.perf_counter()
    try:
        compiled, text = compile_and_read(make_update(config, mesh, networks, optimizer).lower(*arguments))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--aot {topology}: {_memory_message(str(error))}") from None
    figures = _figures(compiled, text, config.batch_size / mesh.size, config.accumulation)
    kind = devices[0].device_kind
    rows = {
        "devices": f"{mesh.size} x {kind}, data={mesh.shape['data']} fsdp={mesh.shape['fsdp']}",
        "samples per device": f"{config.batch_size / mesh.size:g} in {config.accumulation} part(s)",
        **figures,
        "HBM of the device": f"{HBM_GB[kind]} GB" if kind in HBM_GB else "unknown",
        "compiled in": f"{time.perf_counter() - started:.0f} s",
    }
    if DATASETS[config.data.kind].SAMPLE is PixelSample:
        notes.append("the VAE is not in these figures: the encoder runs before the step, on the same devices")
    width = max(map(len, rows))
    return "\n".join([*notes, *(f"{name:<{width}}  {value}" for name, value in rows.items())])


def _figures(compiled: Any, text: str, samples: float, parts: int) -> dict[str, str]:
    cost, held = compiled.cost_analysis(), held_bytes(compiled)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    flops = cost["flops"] / 1e12
    return {
        "weights, optimiser, batch": f"{held / 1e9:.2f} GB per device",
        "temporaries": f"{temporaries / 1e9:.2f} GB per device",
        "memory": f"{(held + temporaries) / 1e9:.2f} GB per device",
        # XLA counts the body of the loop over parts once, and the optimiser is in the count of one part.
        "FLOPs": f"{parts * flops:.2f} T per device, {parts * flops / samples:.2f} T a sample",
        "HBM traffic": f"{parts * cost['bytes accessed'] / 1e9:.0f} GB per device",
        "collectives": _collectives(text),
    }


def _collectives(text: str) -> str:
    # By channel: the compiler repeats a transfer in the text of everything it is fused with.
    channels = {c: set(re.findall(rf" {c}(?:-start)?\(.*?channel_id=(\d+)", text)) for c in COLLECTIVES}
    return ", ".join(f"{len(found)} {c}" for c, found in channels.items() if found) or "none"


def _stand_ins(config: TrainConfig) -> tuple[list[str], TrainConfig]:
    """Published architectures for folders that are not here."""
    notes, changes, perceptual = [], {"init": None}, config.loss.perceptual
    missing = "{}: {} is not here; the published one's shapes are taken"
    needs_teacher = config.loss.needs_teacher
    if needs_teacher and _is_missing(config.teacher):
        notes.append(missing.format("teacher", config.teacher))
        changes["teacher"] = UNetConfig.teacher()
    is_used = perceptual in config.loss.losses
    if is_used and _is_missing(perceptual.network):
        notes.append(missing.format("loss.perceptual.network", perceptual.network))
        perceptual = dataclasses.replace(perceptual, network=perceptual.NETWORK())
        changes["loss"] = dataclasses.replace(config.loss, perceptual=perceptual)
    return notes, config.replace(**changes)


def _is_missing(network: str | Architecture | None) -> bool:
    return isinstance(network, str) and not is_bucket(network) and not Path(network).exists()


def _memory_message(error: str) -> str:
    """The compiler's own sum of what it lacks, or the first line of what it says."""
    needed = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", error)
    if needed:
        return (
            f"does not fit: temporaries of {needed[1]} GiB a device, which has {needed[2]} GiB. Try "
            "student.remat=true, accumulation=2, stream_dtype=bfloat16, or more devices"
        )
    return first_line(error)
