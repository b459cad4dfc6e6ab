"""What turns a kernel into a function like any other: differentiable, and split over a sharded batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
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
    """`kernel` on each device's part of the batch.

    XLA cannot look into a kernel, and would gather a sharded batch for it on every device.

    Args:
        kernel: a function of arrays that treats every item of the batch alone; returns an array or several.
        batched: of each argument, whether its first axis is the batch; the others are the same everywhere.
    """

    def positional(*args: Array) -> Array:
        return kernel(*args)  # whatever options are bound to it

    split = custom_partitioning(positional)

    def partition(mesh: Mesh, arguments: Sequence[Any], result: Any) -> tuple[Any, ...]:
        first = next(a for a, is_batched in zip(arguments, batched, strict=True) if is_batched)
        spec = first.sharding.spec
        here = NamedSharding(mesh, PartitionSpec(spec[0] if spec else None))
        everywhere = NamedSharding(mesh, PartitionSpec())
        results = jax.tree.map(lambda _: here, result)
        return mesh, positional, results, tuple(here if is_batched else everywhere for is_batched in batched)

    def rule(mesh: Mesh, arguments: Sequence[Any], results: Sequence[Any]) -> str:
        del mesh
        terms = [
            " ".join(["b" if i == 0 and is_batched else f"a{n}i{i}" for i in range(len(a.shape))])
            for n, (a, is_batched) in enumerate(zip(arguments, batched, strict=True))
        ]
        outs = [
            " ".join(["b", *(f"z{n}i{i}" for i in range(1, len(result.shape)))])
            for n, result in enumerate(results)
        ]
        return f"{', '.join(terms)} -> {', '.join(outs)}"

    split.def_partition(partition, sharding_rule=rule)
    return split
