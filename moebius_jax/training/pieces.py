"""Weights that lie in pieces on several devices, put together one by one where a layer reads them.

The compiler gathers what is replicated at its first use and keeps it until its last, which for a weight is in
the backward pass. What is read inside a block that is computed again there (`UNetConfig.remat`) is gathered
again as well, so that of the blocks only one has its weights whole at a time.
"""

from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec


class Piecewise(nnx.Param):
    """A parameter that is whole on every device of the context's mesh once it is read."""

    def get_value(self, **options: Any) -> jax.Array:
        value = super().get_value(**options)
        if not isinstance(value, jax.Array):  # but a shape
            return value
        return lax.with_sharding_constraint(value, PartitionSpec())


def read_whole(network: nnx.Module) -> None:
    """Makes every parameter of a network `Piecewise`; its programs must be traced `sharding.with_mesh`."""
    for _, module in nnx.iter_modules(network):
        for name, value in list(vars(module).items()):
            if type(value) is nnx.Param:
                setattr(module, name, Piecewise(value.get_raw_value()))
