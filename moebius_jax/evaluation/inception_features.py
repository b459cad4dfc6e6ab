"""What FID, P-IDS and U-IDS see of a picture: Inception's last map, averaged."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt8

from moebius_jax.models import Inception
from moebius_jax.models.inception import SIDE

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
RESIZE = "bilinear to 299 x 299, half-pixel centres, no antialiasing (as pytorch-fid)"


class InceptionFeatures:
    """Features of batches of pictures, sharded over a mesh.

    Args:
        network: with FID's weights.
        mesh: with an axis `data`.
    """

    def __init__(self, network: Inception, mesh: Mesh) -> None:
        self._graphdef, weights = nnx.split(network)
        self._weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
        self._sharding = NamedSharding(mesh, PartitionSpec("data"))

    def __call__(
        self, images: UInt8[np.ndarray, "B H W 3"], holes: Bool[np.ndarray, "B H W"]
    ) -> tuple[Float[Array, "B 2048"], Float[Array, "B 2048"]]:
        """Features of whole pictures, and of their holes.

        The features of a hole are the same map averaged with each position's share of the hole as its
        weight; of a hole that is the whole picture, they are the picture's. Without a hole they are 0.

        Args:
            images, holes: B a multiple of the devices.
        """
        return _features(self._graphdef, self._weights, *jax.device_put((images, holes), self._sharding))


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


def hole_share(holes: Bool[Array, "B H W"], shape: tuple[int, int]) -> Float[Array, "B h w"]:
    """The share of every cell of a coarser grid that is hole; cells need not be whole numbers of pixels."""
    rows, columns = (_cells(n, m) for n, m in zip(holes.shape[1:], shape, strict=True))
    return jnp.einsum("byx,hy,wx->bhw", holes.astype(jnp.float32), rows, columns, precision="highest")


def _cells(n: int, m: int) -> Float[np.ndarray, "m n"]:
    """[i, j]: share of pixel j, of n, in cell i, of m equal ones."""
    edges = np.arange(m + 1) * (n / m)
    overlap = np.minimum(edges[1:, None], np.arange(1, n + 1)) - np.maximum(edges[:-1, None], np.arange(n))
    return (np.maximum(overlap, 0) * (m / n)).astype(np.float32)


def weighted_mean(maps: Float[Array, "B h w C"], weights: Float[Array, "B h w"]) -> Float[Array, "B C"]:
    """Mean over positions with weights; 0 where they are all 0."""
    total = weights.sum((1, 2))[:, None]
    return jnp.einsum("byxc,byx->bc", maps, weights, precision="highest") / jnp.where(total > 0, total, 1)
