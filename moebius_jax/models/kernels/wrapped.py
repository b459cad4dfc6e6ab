"""What turns a kernel into a function like any other: differentiable, and split over a sharded batch."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array


def with_gradient_of(plain: Callable[..., Array], kernel: Callable[..., Array]) -> Callable[..., Array]:
    """`kernel`, differentiated as `plain`: the same function of the same arrays in XLA's operations."""

    def gradient(*args_and_cotangent: Array) -> tuple[Array, ...]:
        *args, cotangent = args_and_cotangent
        return jax.vjp(plain, *args)[1](cotangent)

    return with_gradient(kernel, gradient)


def with_gradient(
    kernel: Callable[..., Array], gradient: Callable[..., Sequence[Array]]
) -> Callable[..., Array]:
    """`kernel`, differentiated by `gradient(*arguments, cotangent)`: an array for each argument."""
    wrapped = jax.custom_vjp(kernel)

    def forward(*args: Array) -> tuple[Array, tuple[Array, ...]]:
        return kernel(*args), args

    def backward(args: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
        found = gradient(*args, cotangent)
        return tuple(g.astype(a.dtype) for g, a in zip(found, args, strict=True))

    wrapped.defvjp(forward, backward)
    return wrapped


def split_over_batch(kernel: Callable[..., Array], *, batched: Sequence[bool]) -> Callable[..., Array]:
    """`kernel` on each device's part of the batch, in a program traced `sharding.with_mesh`.

    XLA cannot look into a kernel: a GPU would gather a sharded batch for it on every device, a TPU's compiler
    refuses. (`custom_partitioning` would need no mesh, but does not exist on TPUs: jax issue 38196.) A batch
    that the devices do not divide is computed whole on every one of them.

    Args:
        kernel: a function of arrays that treats every item of the batch alone; returns an array or several.
        batched: of each argument, whether its first axis is the batch; the others are the same everywhere.
    """

    def split(*args: Array) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        # Within a shard_map each device has its own part already.
        if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
            return kernel(*args)
        length = next(len(a) for a, is_batched in zip(args, batched, strict=True) if is_batched)
        everywhere = PartitionSpec()
        over = everywhere if length % mesh.size else PartitionSpec(mesh.axis_names)
        places = tuple(over if is_batched else everywhere for is_batched in batched)
        return jax.shard_map(kernel, in_specs=places, out_specs=over, check_vma=False)(*args)

    return split
