"""What the U-Net's levels are built from: residual block, transformer, down- and upsampling."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models.config import UNetConfig
from moebius_jax.models.convolutions import Conv3x3, residual_conv
from moebius_jax.models.cross_attention import CrossAttention
from moebius_jax.models.feed_forward import GEGLU, MixFFN
from moebius_jax.models.gated_linear_attention import GatedLinearAttention
from moebius_jax.models.interactive_lambda import InteractiveLambda
from moebius_jax.models.linear import linear, pointwise_conv
from moebius_jax.models.local_lambda import LocalLambda
from moebius_jax.models.norms import group_norm, layer_norm
from moebius_jax.models.precision import Precision

Map = Float[Array, "B H W C"]


class ResidualBlock(nnx.Module):
    """GN → SiLU → conv → + time → GN → SiLU → conv, + shortcut (spec "Skeleton")."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: UNetConfig,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        common = {"precision": precision, "rngs": rngs}
        self.norm1 = group_norm(in_channels, eps=1e-5, **common)
        self.conv1 = residual_conv(config.residual_conv, in_channels, out_channels, **common)
        self.time_emb_proj = linear(4 * config.channels[0], out_channels, thin=True, **common)
        self.norm2 = group_norm(out_channels, eps=1e-5, **common)
        self.conv2 = residual_conv(config.residual_conv, out_channels, out_channels, **common)
        self.conv_shortcut = (
            pointwise_conv(in_channels, out_channels, use_bias=True, thin=True, **common)
            if in_channels != out_channels
            else None
        )

    def __call__(self, x: Map, time: Float[Array, "B D"]) -> Map:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = y + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class TransformerBlock(nnx.Module):
    """x += self(LN x); x += cross(LN x, context); x += ff(LN x). The switches choose the three."""

    def __init__(
        self,
        channels: int,
        map_size: int,
        config: UNetConfig,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        common = {"precision": precision, "rngs": rngs}
        self.norm1 = layer_norm(channels, **common)
        if config.self_mixer == "gla":
            self.self_mixer = GatedLinearAttention(channels, config, **common)
        else:
            self.self_mixer = LocalLambda(channels, config, **common)
        self.norm2 = layer_norm(channels, **common)
        if config.cross_mixer == "attention":
            self.cross_mixer = CrossAttention(channels, config, **common)
        else:
            self.cross_mixer = InteractiveLambda(channels, map_size, config, **common)
        self.norm3 = layer_norm(channels, **common)
        if config.feed_forward == "geglu":
            self.feed_forward = GEGLU(channels, **common)
        else:
            self.feed_forward = MixFFN(channels, config, **common)

    def __call__(self, x: Map, context: Float[Array, "B L D"]) -> Map:
        x = x + self.self_mixer(self.norm1(x))
        x = x + self.cross_mixer(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class Transformer(nnx.Module):
    """GN → 1x1 conv → one transformer block → 1x1 conv, + input."""

    def __init__(
        self,
        channels: int,
        map_size: int,
        config: UNetConfig,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        common = {"precision": precision, "rngs": rngs}
        self.norm = group_norm(channels, eps=1e-6, **common)
        self.proj_in = pointwise_conv(channels, channels, use_bias=True, thin=True, **common)
        self.block = TransformerBlock(channels, map_size, config, **common)
        self.proj_out = pointwise_conv(channels, channels, use_bias=True, thin=True, **common)
        self.remat = config.remat

    def __call__(self, x: Map, context: Float[Array, "B L D"]) -> Map:
        call = nnx.remat(Transformer._apply) if self.remat else Transformer._apply
        return call(self, x, context)

    def hidden(self, x: Map, context: Float[Array, "B L D"]) -> Map:
        """What `proj_out` multiplies: a call is x + proj_out(hidden(x, context))."""
        call = nnx.remat(Transformer._hidden) if self.remat else Transformer._hidden
        return call(self, x, context)

    def _hidden(self, x: Map, context: Float[Array, "B L D"]) -> Map:
        return self.block(self.proj_in(self.norm(x)), context)

    def _apply(self, x: Map, context: Float[Array, "B L D"]) -> Map:
        return x + self.proj_out(self._hidden(x, context))


class Downsample(nnx.Module):
    """3x3 convolution, stride 2, padding 1 on every side."""

    def __init__(self, channels: int, *, precision: Precision, rngs: nnx.Rngs) -> None:
        self.conv = Conv3x3(channels, channels, stride=2, precision=precision, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int, *, precision: Precision, rngs: nnx.Rngs) -> None:
        self.conv = Conv3x3(channels, channels, precision=precision, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        B, H, W, C = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
        return self.conv(doubled)
