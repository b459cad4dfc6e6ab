"""The two feed-forward layers: GEGLU (teacher) and Mix-FFN (student)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models.convolutions import DepthwiseConv
from moebius_jax.models.linear import Linear, PointwiseConv
from moebius_jax.models.parts import BlockSizes, Part
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Shapes, Table

Map = Float[Array, "B H W C"]


class GEGLU(Part):
    """Linear C→8C, split [x | gate], x·gelu(gate) with the exact (erf) GELU, Linear 4C→C."""

    RELEASED: ClassVar[Table] = {"proj_in": "net.0.proj", "proj_out": "net.2"}
    READERS: ClassVar[tuple[str, ...]] = ("proj_in",)
    LANDMARK: ClassVar[str] = "net.0.proj.weight"

    def __init__(self, sizes: BlockSizes, *, precision: Precision, rngs: nnx.Rngs) -> None:
        common = {"precision": precision, "rngs": rngs}
        self.proj_in = Linear(sizes.channels, 8 * sizes.channels, precision=precision.hidden(), rngs=rngs)
        self.proj_out = Linear(4 * sizes.channels, sizes.channels, **common)

    def __call__(self, x: Map) -> Map:
        x, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(x * jax.nn.gelu(gate, approximate=False))


class MixFFN(Part):
    """1x1 C→2·hid, SiLU, depthwise 3x3, split [x | gate], x·SiLU(gate), 1x1 hid→C (docs/model.md)."""

    RELEASED: ClassVar[Table] = {
        part: f"{part}.conv" for part in ("inverted_conv", "depth_conv", "point_conv")
    }
    READERS: ClassVar[tuple[str, ...]] = ("inverted_conv",)
    LANDMARK: ClassVar[str] = "inverted_conv.conv.weight"

    def __init__(self, sizes: BlockSizes, *, precision: Precision, rngs: nnx.Rngs) -> None:
        hidden = int(sizes.ffn_ratio * sizes.channels)
        common = {"precision": precision, "rngs": rngs}
        # The widest maps of the network.
        wide = {"precision": precision.hidden(), "rngs": rngs}
        self.inverted_conv = PointwiseConv(sizes.channels, 2 * hidden, use_bias=True, **wide)
        self.depth_conv = DepthwiseConv(2 * hidden, use_bias=True, **common)
        self.point_conv = PointwiseConv(hidden, sizes.channels, use_bias=False, **common)

    def onto(self, stream: Map, x: Map) -> Map:
        return self(x, add=(stream,))

    def __call__(self, x: Map, *, add: Sequence[Array] = ()) -> Map:
        """`add`: maps added to the result."""
        hidden = self.inverted_conv(x, then=jax.nn.silu)
        x, gate = jnp.split(self.depth_conv(hidden), 2, axis=-1)
        return self.point_conv(x * jax.nn.silu(gate), add=add)

    @classmethod
    def read_sizes(cls, shapes: Shapes, channels: int) -> dict[str, Any]:
        return {"ffn_ratio": shapes["inverted_conv.conv.weight"][0] / 2 / channels}
