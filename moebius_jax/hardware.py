"""What devices could do at best, and their way of saying that something was too much."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from moebius_jax.errors import UserError

# Dense bfloat16 FLOP/s and bytes/s of device kinds, as jax names them.
PEAKS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.0e12),
    "TPU v5 lite": (197e12, 0.819e12),
    "TPU v5e": (197e12, 0.819e12),
    "TPU v4": (275e12, 1.2e12),
    "TPU v6 lite": (918e12, 1.64e12),
}


def peak_flops(mesh: Mesh) -> float | None:
    """Dense bfloat16 FLOP/s of all devices of a mesh; None where we do not know."""
    kind = mesh.devices.flat[0].device_kind
    return PEAKS[kind][0] * mesh.size if kind in PEAKS else None


@contextlib.contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Makes a `UserError` of a device's error that `what` does not fit in its memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{what} does not fit in the device's memory; use a smaller batch size") from None
