"""The release's name and layout of every tensor of ours, put together from what each module says of itself.

The way goes from our names to the release's, so a complete list of what a release file must hold follows from
an architecture alone, and conversion works both ways from one list.
"""

import dataclasses
import functools
from collections.abc import Mapping

from flax import nnx

from moebius_jax.models.architecture import Architecture
from moebius_jax.models.released import Layout, Released
from moebius_jax.weights.tensors import abstract_network, abstract_tensors

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counterpart:
    """How the release keeps one of our tensors.

    Attributes:
        names: there; E-LatentLPIPS files hold some tensors twice.
        layout: how the two lie.
        muon: whether the release's optimiser orthogonalises it.
    """

    names: tuple[str, ...]
    layout: Layout
    muon: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a released tensor goes.

    Attributes:
        path: our dotted name.
        shape: the released (torch) shape.
        layout: how the two lie.
    """

    path: str
    shape: Shape
    layout: Layout


@functools.cache
def counterparts(architecture: Architecture) -> Mapping[str, Counterpart]:
    """Our dotted name → how the release keeps it, for every tensor of an architecture.

    Raises:
        TypeError: a module does not say how a matrix of its lies in the release.
    """
    network = abstract_network(architecture)
    rename = getattr(network, "released_names", lambda name: (name,))
    found = {}
    for path, abstract in abstract_tensors(architecture).items():
        said = _follow(network, path.split("."), len(abstract.shape))
        found[path] = _counterpart(rename(said.name), said, len(abstract.shape))
    return found


def expected_tensors(architecture: Architecture) -> dict[str, Slot]:
    """Every tensor of a release file of this architecture, by its released name.

    Counters (`num_batches_tracked`) are left out: see `counters`.
    """
    slots = {}
    for path, counterpart in counterparts(architecture).items():
        layout = counterpart.layout
        shape = layout.torch_shape(abstract_tensors(architecture)[path].shape)
        for name in counterpart.names:
            if name in slots:
                raise TypeError(f"two of our tensors are called {name} in the release: {path} is one")
            slots[name] = Slot(path=path, shape=shape, layout=layout)
    return slots


def counters(expected: Mapping[str, Slot]) -> set[str]:
    """Names of the BatchNorm step counters that go with these tensors; they carry nothing."""
    suffix = ".running_mean"
    return {n.removesuffix(suffix) + ".num_batches_tracked" for n in expected if n.endswith(suffix)}


def _follow(network: nnx.Module, path: list[str], rank: int) -> Released:
    """What the modules from the network down to a tensor say of it, with its whole name."""
    node, names, muon = network, [], True
    for depth, key in enumerate(path, start=1):
        said = getattr(node, "RELEASED", {}).get(key)
        if said is None and rank > 1 and depth == len(path):
            raise TypeError(
                f"{'.'.join(path)} has {rank} axes and {type(node).__name__} does not say how they lie in "
                f"the release; add {key!r} to its RELEASED (docs/extending.md)"
            )
        said = said if isinstance(said, Released) else Released(said or key)
        names.append(said.name)
        muon = muon and said.muon
        node = node[int(key)] if isinstance(node, nnx.List) else getattr(node, key)
    return dataclasses.replace(said, name=".".join(names), muon=muon)


def _counterpart(names: tuple[str, ...], said: Released, rank: int) -> Counterpart:
    return Counterpart(names=names, layout=said.layout, muon=said.muon and rank > 1)
