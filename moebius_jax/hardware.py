"""Devices: what they could do at best, how they say that something was too much, those of a TPU slice."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from moebius_jax.errors import UserError, first_line
from moebius_jax.models.forms import SWITCH

# Dense bfloat16 FLOP/s and bytes/s of device kinds, as jax names them.
PEAKS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.0e12),
    "TPU v5 lite": (197e12, 0.819e12),
    "TPU v5e": (197e12, 0.819e12),
    "TPU v4": (275e12, 1.2e12),
    "TPU v5": (459e12, 2.765e12),  # v5p
    "TPU v6 lite": (918e12, 1.64e12),
}
# How compilers begin when one kernel is the matter: too large for a GPU's processor or a TPU's core, or not
# understood.
_OF_KERNELS = ("Shared memory size", "memory space vmem", "Triton", "Mosaic")
_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # CPUs report it as an internal error


def peak_flops(mesh: Mesh) -> float | None:
    """Dense bfloat16 FLOP/s of all devices of a mesh; None where we do not know."""
    kind = mesh.devices.flat[0].device_kind
    return PEAKS[kind][0] * mesh.size if kind in PEAKS else None


def device_error(error: Exception, what: str, *, less: str = "a smaller batch size") -> UserError | None:
    """What a device's (or the host's) error means for the caller; None if it is none of these.

    `what` does not fit in its memory, where `less` may, or its compiler takes one of our kernels as too large
    or cannot read it.
    """
    is_of_device, said = isinstance(error, jax.errors.JaxRuntimeError), first_line(error)
    if is_of_device and any(word in said for word in _OF_KERNELS):
        return UserError(
            f"{what}: a kernel of ours does not compile for {jax.local_devices()[0].device_kind} ({said}); "
            f"with {SWITCH}=off in the environment there are none"
        )
    if isinstance(error, MemoryError) or (is_of_device and any(word in str(error) for word in _OF_MEMORY)):
        return UserError(f"{what} does not fit in the device's memory; use {less}")
    return None


@contextlib.contextmanager
def device_errors(what: str, **options: str) -> Iterator[None]:
    """Makes a `UserError` of an error that `device_error`, which has the `options`, knows."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if meant := device_error(error, what, **options):
            raise meant from None
        raise


def require_memory(tree: Any) -> None:
    """Raises UserError if arrays of these shapes and shardings are more than a device has memory for."""
    device = jax.local_devices()[0]
    has = None
    with contextlib.suppress(jax.errors.JaxRuntimeError, NotImplementedError):  # not every backend tells
        has = (device.memory_stats() or {}).get("bytes_limit")
    if has is None and device.platform == "cpu" and hasattr(os, "sysconf"):
        has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    leaves = jax.tree.leaves(tree)
    wanted = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    if has is not None and wanted > has:
        raise UserError(
            f"parameters, averages and optimiser take {wanted / 2**30:,.0f} GiB a device, which has "
            f"{has / 2**30:,.0f}; expected a smaller student, or more devices to share it (fsdp)"
        )


def held_bytes(program: jax.stages.Compiled) -> int:
    """What a compiled program holds on one device beside its temporaries; what is given away counts once."""
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def compile_and_read(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """A program for a TPU slice, and its text: as jax gives it, or as the compiler has written it itself.

    The compiler may be newer than what jax reads programs with: libtpu 0.0.51 puts operations into programs
    for v6e at which jaxlib 0.10 gives up.

    Raises:
        jax.errors.JaxRuntimeError: it cannot be compiled, or read in either way.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Its analyses of buffers, which nobody reads, would be the most of it.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        options["xla_dump_buffer_assignment_analysis"] = False
        compiled = lowered.compile(compiler_options=options)
        try:
            return compiled, compiled.as_text()
        except jax.errors.JaxRuntimeError:
            written = list(Path(folder).glob("*.after_codegen.txt"))
            if not written:
                raise
            return compiled, max(written, key=lambda path: path.stat().st_size).read_text()


def slice_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice, to compile for on a machine without one.

    The process must not have started jax's devices yet.

    Args:
        topology: as libtpu names it, "v5e:4x8".

    Raises:
        UserError: no libtpu, or no such slice.
    """
    # Any accelerator type will do; libtpu wants one, and would ask the cloud for it, and look for a TPU here.
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    jax.config.update("jax_platforms", "cpu")
    # libtpu's own choice for v4 is a device for each of a chip's two cores; a real slice's are whole chips.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
        return list(found.devices)
    except Exception as error:  # libtpu missing, or whatever it makes of the name
        raise UserError(
            f'compiling for {topology}: {first_line(error)}. It needs libtpu (pip install -e ".[aot]") and a '
            "slice such as v5e:4x8, v4:2x2x4 or v6e:4x4"
        ) from None
