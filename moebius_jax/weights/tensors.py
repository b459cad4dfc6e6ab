"""Networks and their tensors by dotted name: taken out, put in, counted, compared."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array

from moebius_jax.models.architecture import Architecture
from moebius_jax.models.initializers import KeyStream
from moebius_jax.weights.kinds import KINDS, kind_of

Tensors = dict[str, Array]
Network = TypeVar("Network", bound=nnx.Module)


def network_tensors(network: nnx.Module) -> Tensors:
    """Parameters and BatchNorm statistics by dotted name."""
    return {name: variable[...] for name, variable in _variables(network, nnx.Param, nnx.BatchStat)}


def split_tensors(network: nnx.Module) -> tuple[Tensors, Tensors]:
    """Parameters and BatchNorm statistics of a module, each by dotted name."""
    return tuple(
        {name: variable[...] for name, variable in _variables(network, kind)}
        for kind in (nnx.Param, nnx.BatchStat)
    )


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

    @functools.cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every tensor by dotted name."""
        return {_name(p): jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in self._variables}

    @functools.cached_property
    def statistics(self) -> frozenset[str]:
        """Names of BatchNorm's running statistics."""
        return frozenset(_name(path) for path, v in self._variables if isinstance(v, nnx.BatchStat))


def abstract_network(
    architecture: Architecture, *, param_dtype: Dtype = jnp.float32, **dtypes: Dtype
) -> nnx.Module:
    """A network of shapes instead of arrays; `dtypes` are the network's other ones."""
    build = KINDS[kind_of(architecture)].network
    return nnx.eval_shape(
        lambda: build(architecture, param_dtype=param_dtype, rngs=KeyStream(jax.random.key(0)), **dtypes)
    )


def abstract_tensors(architecture: Architecture) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Dotted name → shape and fp32 dtype of every tensor of an architecture."""
    return _bare(architecture).shapes


def statistics_of(architecture: Architecture) -> frozenset[str]:
    """Which of them are BatchNorm's running statistics; they stay fp32 in every folder."""
    return _bare(architecture).statistics


@functools.cache
def _bare(architecture: Architecture) -> Bare:
    return Bare(abstract_network(architecture))


def fill(network: Network, tensors: Mapping[str, Array]) -> Network:
    """An abstract network with its arrays, in the mode it has."""
    return Bare(network)(tensors)


def count_parameters(architecture: Architecture) -> int:
    """Trainable numbers of an architecture; BatchNorm's statistics are not among them."""
    statistics = statistics_of(architecture)
    return sum(a.size for name, a in abstract_tensors(architecture).items() if name not in statistics)


def digest(network: nnx.Module) -> str:
    """SHA-256 of a network's tensors: names, shapes, dtypes and values, whatever folder they came from."""
    total = hashlib.sha256()
    for name, value in sorted(network_tensors(network).items()):
        array = np.asarray(value)
        total.update(f"{name} {array.dtype} {array.shape}\0".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names → nested dictionaries."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries → dotted names."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _variables(network: nnx.Module, *kinds: type[nnx.Variable]) -> list[tuple[str, nnx.Variable]]:
    return [(_name(path), variable) for path, variable in nnx.to_flat_state(nnx.state(network, kinds))]


def _name(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path))
