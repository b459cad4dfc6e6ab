"""What a U-Net's switches choose between: the base of mixers and feed-forward layers, and their sizes."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from moebius_jax.models.architecture import EXECUTION
from moebius_jax.models.released import Shapes, Table
from moebius_jax.schema import Platform, Side, Width, checked

PositionOrder = Literal["auto", "conv3d", "toeplitz", "banded", "tiles", "fused"]


@checked
class Sizes:
    """Sizes all levels share.

    Attributes:
        num_heads: heads h of both mixers; a level of width C has k = v = C/h.
        context_dim, context_length: width and number of the context tokens.
        window: side of Local-λ's position window, odd.
        ffn_ratio: Mix-FFN's hidden width is int(ffn_ratio · C).
        position_order: evaluation order of Local-λ's position term; "auto" picks by map size, dtype and
            platform. Never changes the function. "fused", content and position term in one kernel, is for
            GPUs, and TPUs from v5 on; on CPUs it is interpreted, very slowly.
        platform: the platform "auto" picks for; None is the running one. Needed only when compiling for
            another machine.
    """

    num_heads: Width = 8
    context_dim: Width = 768
    context_length: Side = 10
    window: Side = 15
    ffn_ratio: Annotated[float, Field(ge=1 / 64, le=64)] = 2.5
    position_order: PositionOrder = dataclasses.field(default="auto", metadata=EXECUTION)
    platform: Platform | None = dataclasses.field(default=None, metadata=EXECUTION)


@checked
class BlockSizes(Sizes):
    """What the parts of one transformer are built from.

    Attributes:
        channels: C, of the map.
        map_size: side of the map the network was trained at, in positions.
    """

    channels: Width
    map_size: Side

    @property
    def depth(self) -> int:
        """k = v = C/h."""
        return self.channels // self.num_heads


class Part(nnx.Module):
    """A mixer or a feed-forward layer, built as `Part(sizes, precision=…, rngs=…)`.

    A self mixer and a feed-forward layer are called with the map [B, H, W, C], a cross mixer with the map and
    what its `prepare` made of the context; they return a map of the same shape. To add one:
    docs/extending.md.

    Attributes:
        RELEASED: how the release calls and lays out what is in it.
        FOLDS: BatchNorm layer → the bias-free linear layer right before it, which it is folded into.
        READERS: the linear layers that read the map, if nothing else does.
        LANDMARK: a released tensor, below the part's own name, that tells a file with this part from others.
    """

    RELEASED: ClassVar[Table] = {}
    FOLDS: ClassVar[dict[str, str]] = {}
    READERS: ClassVar[tuple[str, ...]] = ()
    LANDMARK: ClassVar[str]

    def prepare(self, context: Float[Array, "B L D"]) -> Any:
        """Of a cross mixer: what it needs of the context tokens, worked out once for all calls with them."""
        return context

    def onto(self, stream: Float[Array, "B H W C"], *args: Any) -> Float[Array, "B H W C"]:
        """`stream` plus a call; a part that can add it on the way overrides this."""
        return stream + self(*args)

    def takes_over(self, norm: nnx.LayerNorm) -> bool:
        """Whether a kernel of the part's own does at inference what `norm` does before the READERS."""
        del norm
        return False

    @classmethod
    def read_sizes(cls, shapes: Shapes, channels: int) -> dict[str, Any]:
        """What of `Sizes` shows in released shapes; `map_size` too, where it does.

        Args:
            shapes: of the part's tensors, by name below its own.
            channels: of the map.

        Raises:
            ValueError: they contradict each other.
        """
        del shapes, channels
        return {}
