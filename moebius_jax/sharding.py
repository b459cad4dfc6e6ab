"""Where arrays lie: one mesh of two axes, one rule for tensors, one for batches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moebius_jax.errors import UserError

SMALLEST_SHARDED = 2**14  # elements; below it a tensor is copied to every device


def make_mesh(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """Devices as a `data` x `fsdp` mesh (Auto axes), as the topology of a slice suits it.

    Several TPU slices lie behind each other on `data`: the network between them carries gradients alone.

    Args:
        devices: all of all processes by default. Sampling takes `jax.local_devices()`.
        fsdp: how many of them share one copy of weights and optimiser.

    Raises:
        UserError: the number of devices, of a slice where there are several, is no multiple of `fsdp`.
    """
    devices = list(devices) if devices is not None else jax.devices()
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if len(devices) // slices % fsdp:
        of_a_slice = f" of each of {slices} slices" if slices > 1 else ""
        raise UserError(
            f"fsdp is {fsdp}; expected a divisor of the {len(devices) // slices} devices{of_a_slice}"
        )
    axes = {"axis_names": ("data", "fsdp"), "axis_types": (AxisType.Auto, AxisType.Auto)}
    shape = (len(devices) // slices // fsdp, fsdp)
    if slices > 1:
        return Mesh(mesh_utils.create_hybrid_device_mesh(shape, (slices, 1), devices), **axes)
    return jax.make_mesh(shape, devices=devices, **axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def with_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function`, traced for these devices: its kernels take each device's share of a batch.

    What it is called with must lie on all of them. On TPUs a program for several devices that is not traced
    so is an error of the compiler's where it has kernels, on GPUs slow.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def of_each_device(function: Callable[..., Any], mesh: Mesh, sharded: int) -> Callable[..., Any]:
    """`function` as each device alone would compute it from its share of a batch; the mean of the results.

    Args:
        function: of arrays.
        mesh: all its devices.
        sharded: which argument is the batch; the others are whole everywhere.
    """

    def mean(*arguments: Any) -> Any:
        return jax.tree.map(lambda x: lax.pmean(x, mesh.axis_names), function(*arguments))

    def apply(*arguments: Any) -> Any:
        places = [PartitionSpec()] * len(arguments)
        places[sharded] = batch_sharding(mesh).spec
        # Unchecked: the checked form would add gradients up over devices before they have been looked at.
        return jax.shard_map(
            mean, mesh=mesh, in_specs=tuple(places), out_specs=PartitionSpec(), check_vma=False
        )(*arguments)

    return apply


def plain_bools(tree: Any) -> Any:
    """NumPy arrays in which every True is a byte of one.

    NumPy is content with any byte but zero, and PIL's bitmaps come with 255. XLA reads the byte: 1 - hole has
    been 2 and -254 inside such holes.
    """

    def plain(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.view(np.uint8) != 0 if x.dtype == bool else x

    return jax.tree.map(plain, tree)


def tensor_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The longest axis `fsdp` divides, over `fsdp`; small tensors, and those without such an axis, whole.

    A rule of shapes alone, so that a parameter, its average and its momenta lie alike.
    """
    shards = mesh.shape["fsdp"]
    fitting = [n for n in shape if n % shards == 0]
    if shards == 1 or not fitting or np.prod(shape) < SMALLEST_SHARDED:
        return replicated(mesh)
    axis = shape.index(max(fitting))
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """`tensor_sharding` of every leaf."""
    return jax.tree.map(lambda leaf: tensor_sharding(mesh, leaf.shape), tree)
