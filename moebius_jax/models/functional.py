"""Networks as pure functions: the graph on one side, the arrays as flat dictionaries on the other."""

from collections.abc import Mapping
from typing import Generic, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

Tensors = dict[str, Array]
Network = TypeVar("Network", bound=nnx.Module)


def split_tensors(network: nnx.Module) -> tuple[Tensors, Tensors]:
    """Parameters and BatchNorm statistics of a module, each by dotted name."""
    return _flat(nnx.state(network, nnx.Param)), _flat(nnx.state(network, nnx.BatchStat))


class Bare(Generic[Network]):
    """A network without its arrays, in the mode (training or evaluation) it had when it was taken."""

    def __init__(self, network: Network) -> None:
        self._graphdef, state = nnx.split(network)
        self._variables = nnx.to_flat_state(state)
        self.config = network.config

    def __call__(self, tensors: Mapping[str, Array]) -> Network:
        """The network with these parameters and statistics, by dotted name. Extra names are ignored.

        Raises:
            KeyError: one is missing.
        """
        # Not the variables themselves: a network in training mode writes its statistics into them.
        filled = [(path, v.replace(tensors[_name(path)])) for path, v in self._variables]
        return nnx.merge(self._graphdef, nnx.from_flat_state(filled))

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every tensor by dotted name."""
        return {_name(p): jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in self._variables}


def _flat(state: nnx.State) -> Tensors:
    return {_name(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def _name(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path))
