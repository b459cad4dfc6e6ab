"""What FID, P-IDS and U-IDS see of a picture: Inception's last map, averaged."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8

from moebius_jax.evaluation.metrics.hole_means import hole_share, weighted_mean
from moebius_jax.models import Inception
from moebius_jax.models.inception import SIDE
from moebius_jax.sharding import batch_sharding, plain_bools, replicated

RESIZE = "bilinear to 299 x 299, half-pixel centres, no antialiasing (as pytorch-fid)"


class InceptionFeatures:
    """Features of batches of pictures, sharded over a mesh.

    Args:
        network: with FID's weights.
        mesh: its devices share each batch.
    """

    def __init__(self, network: Inception, mesh: Mesh) -> None:
        self._graphdef, weights = nnx.split(network)
        self._weights = jax.device_put(weights, replicated(mesh))
        self._sharding = batch_sharding(mesh)

    def __call__(
        self, images: UInt8[np.ndarray, "B H W 3"], holes: Bool[np.ndarray, "B H W"]
    ) -> tuple[Float[Array, "B 2048"], Float[Array, "B 2048"]]:
        """Features of whole pictures, and of their holes.

        The features of a hole are the same map averaged with each position's share of the hole as its
        weight; of a hole that is the whole picture, they are the picture's. Without a hole they are 0.

        Args:
            images, holes: B a multiple of the devices.
        """
        arrays = jax.device_put((images, plain_bools(holes)), self._sharding)
        return _features(self._graphdef, self._weights, *arrays)


@jax.jit(static_argnums=0)
def _features(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    images: UInt8[Array, "B H W 3"],
    holes: Bool[Array, "B H W"],
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    batch = images.shape[0]
    x = images.astype(jnp.float32) / 255
    x = jax.image.resize(x, (batch, SIDE, SIDE, 3), "bilinear", antialias=False)
    maps = nnx.merge(graphdef, weights)(2 * x - 1)
    return maps.mean((1, 2)), weighted_mean(maps, hole_share(holes, maps.shape[1:3]))
