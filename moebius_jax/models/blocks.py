"""What the U-Net's levels are built from: residual block, transformer, down- and upsampling."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models import forms, winograd
from moebius_jax.models.config import UNetConfig
from moebius_jax.models.convolutions import Conv3x3, Padding
from moebius_jax.models.kernels.tpu.upsample import interleave
from moebius_jax.models.kernels.wrapped import split_over_batch
from moebius_jax.models.linear import Linear, PointwiseConv, Product
from moebius_jax.models.norms import GroupNorm, LayerNorm
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Table
from moebius_jax.models.switches import CROSS_MIXERS, FEED_FORWARDS, RESIDUAL_CONVS, SELF_MIXERS

Map = Float[Array, "B H W C"]


class ResidualBlock(nnx.Module):
    """GN → SiLU → conv → + time → GN → SiLU → conv, + shortcut (docs/model.md)."""

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
        conv = RESIDUAL_CONVS[config.residual_conv]
        self.norm1 = GroupNorm(in_channels, eps=1e-5, **common)
        self.conv1 = conv(in_channels, out_channels, **common)
        self.time_emb_proj = Linear(4 * config.channels[0], out_channels, thin=True, **common)
        self.norm2 = GroupNorm(out_channels, eps=1e-5, **common)
        self.conv2 = conv(out_channels, out_channels, **common)
        self.conv_shortcut = (
            PointwiseConv(in_channels, out_channels, use_bias=True, thin=True, **common)
            if in_channels != out_channels
            else None
        )
        self.remat = config.remat

    def __call__(self, x: Map, shift: Float[Array, "B C"], *, skip: Map | None = None) -> Map:
        """Of `x`, and behind its channels those of `skip`.

        `shift` comes from `shift()`; of length 1 it is that of all items.
        """
        return _recomputed(ResidualBlock._apply, self.remat)(self, x, shift, skip)

    def _apply(self, x: Map, shift: Float[Array, "B C"], skip: Map | None) -> Map:
        if skip is not None:
            x = jnp.concatenate([x, skip], axis=-1)
        y = self.conv1(self.norm1(x, then=jax.nn.silu), add=(shift[:, None, None, :],))
        shortcut = x if self.conv_shortcut is None else Product(x, self.conv_shortcut)
        return self.conv2(self.norm2(y, then=jax.nn.silu), add=(shortcut,))

    def shift(self, time: Float[Array, "B D"]) -> Float[Array, "B C"]:
        """What the timestep adds between the convolutions."""
        return self.time_emb_proj(jax.nn.silu(time))


class TransformerBlock(nnx.Module):
    """x += self(LN x); x += cross(LN x, context); x += ff(LN x). The switches choose the three.

    `context` is what the cross mixer's `prepare` made of the context tokens.
    """

    RELEASED: ClassVar[Table] = {"self_mixer": "attn1", "cross_mixer": "attn2", "feed_forward": "ff"}

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
        sizes = config.block(channels, map_size)
        self.norm1 = LayerNorm(channels, **common)
        self.self_mixer = SELF_MIXERS[config.self_mixer](sizes, **common)
        self.norm2 = LayerNorm(channels, **common)
        self.cross_mixer = CROSS_MIXERS[config.cross_mixer](sizes, **common)
        self.norm3 = LayerNorm(channels, **common)
        self.feed_forward = FEED_FORWARDS[config.feed_forward](sizes, **common)

    def __call__(self, x: Map, context: Any) -> Map:
        x = self.self_mixer.onto(x, _normed(self.norm1, x))
        x = self.cross_mixer.onto(x, _normed(self.norm2, x), context)
        return self.feed_forward.onto(x, _normed(self.norm3, x))

    def fold_norms(self) -> None:
        """For inference: norms become part of the products after them, where those can take them over."""
        parts = {"norm1": self.self_mixer, "norm2": self.cross_mixer, "norm3": self.feed_forward}
        for name, part in parts.items():
            norm = getattr(self, name)
            if norm is None:
                continue
            # Of the part's own class only: another that is built on it may read the map in more places.
            readers = [getattr(part, reader) for reader in type(part).__dict__.get("READERS", ())]
            if readers and (part.takes_over(norm) or all(reader.can_take_over(norm) for reader in readers)):
                for reader in readers:
                    reader.take_over(norm)
                setattr(self, name, None)


def _recomputed(call: Callable[..., Map], remat: bool) -> Callable[..., Map]:
    """`call`, or what computes it again in the backward pass."""
    return nnx.remat(call) if remat else call


def _normed(norm: LayerNorm | None, x: Map) -> Map:
    """`norm` of `x`; None is one that became part of the products after it."""
    return x if norm is None else norm(x)


class Transformer(nnx.Module):
    """GN → 1x1 conv → one transformer block → 1x1 conv, + input."""

    RELEASED: ClassVar[Table] = {"block": "transformer_blocks.0"}

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
        self.norm = GroupNorm(channels, eps=1e-6, **common)
        self.proj_in = PointwiseConv(channels, channels, use_bias=True, thin=True, **common)
        self.block = TransformerBlock(channels, map_size, config, **common)
        self.proj_out = PointwiseConv(channels, channels, use_bias=True, thin=True, **common)
        self.remat = config.remat

    def __call__(self, x: Map, context: Any) -> Map:
        return _recomputed(Transformer._apply, self.remat)(self, x, context)

    def prepare(self, context: Float[Array, "B L D"]) -> Any:
        """What a call takes of the context tokens."""
        return self.block.cross_mixer.prepare(context)

    def hidden(self, x: Map, context: Any) -> Map:
        """What `proj_out` multiplies: a call is x + proj_out(hidden(x, context))."""
        return _recomputed(Transformer._hidden, self.remat)(self, x, context)

    def _hidden(self, x: Map, context: Any) -> Map:
        return self.block(self.proj_in(self.norm(x)), context)

    def _apply(self, x: Map, context: Any) -> Map:
        return self.proj_out(self._hidden(x, context), add=(x,))


class Downsample(nnx.Module):
    """3x3 convolution at stride 2."""

    def __init__(
        self,
        channels: int,
        *,
        padding: Padding = ((1, 1), (1, 1)),
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = Conv3x3(channels, channels, stride=2, padding=padding, precision=precision, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest x2, then a 3x3 convolution.

    A 3x3 window over doubled pixels sees two distinct rows and columns, which ones depends on whether the
    position's row and column are even or odd. So the four phases are 2x2 convolutions of the map itself, with
    sums of the kernel's rows and columns: 4/9 of the multiplications (`forms.upsampling_in_phases`).
    """

    def __init__(self, channels: int, *, precision: Precision, rngs: nnx.Rngs) -> None:
        self.conv = Conv3x3(channels, channels, precision=precision, rngs=rngs)
        self.platform = precision.platform
        self.phases = None  # the four kernels, once frozen

    def freeze(self) -> None:
        """For inference: the phases' kernels."""
        in_phases = forms.upsampling_in_phases(self.conv.dtype, self.platform, has_gradient=False)
        if in_phases and self.phases is None:
            self.phases = nnx.data(nnx.Param(self._phase_kernels()))
            self.conv.kernel = None

    def __call__(self, x: Map) -> Map:
        is_frozen = self.phases is not None
        if is_frozen or forms.upsampling_in_phases(self.conv.dtype, self.platform, has_gradient=True):
            return self._in_phases_on_tpu(x) if forms.tpu_kernels(self.platform) else self._in_phases(x)
        B, H, W, C = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
        return self.conv(doubled)

    def _phase_kernels(self) -> Float[Array, "2 2 C 4D"]:
        return _phase_kernels(self.conv.kernel[...]).astype(self.conv.dtype)

    def _in_phases(self, x: Map) -> Map:
        B, H, W, _ = x.shape
        y = self._phases(x.astype(self.conv.dtype))
        # Row i of the doubled map's odd rows lies between rows i and i+1, of its even ones between i-1 and i.
        y = y.reshape(*y.shape[:3], 2, 2, -1)
        rows = [jnp.stack([y[:, i : i + H, j : j + W, i, j] for j in (0, 1)], axis=3) for i in (0, 1)]
        doubled = jnp.stack(rows, axis=2).reshape(B, 2 * H, 2 * W, -1)
        return (doubled + self.conv.bias[...].astype(doubled.dtype)).astype(self.conv.stream_dtype)

    def _phases(self, x: Map) -> Float[Array, "B H+1 W+1 4D"]:
        """All four, one row and column of spare positions more where a CPU wants them."""
        is_frozen = self.phases is not None
        phases = self.phases[...] if is_frozen else self._phase_kernels()
        if is_frozen and forms.fewer_multiplications(x.shape, phases.shape, x.dtype, self.platform):
            return winograd.convolved(x, phases)
        spare = [forms.spare_positions(n + 1, self.platform) for n in x.shape[1:3]]
        return jax.lax.conv_general_dilated(
            x,
            phases,
            window_strides=(1, 1),
            padding=[(1, 1 + more) for more in spare],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def _in_phases_on_tpu(self, x: Map) -> Map:
        phases = [
            jax.lax.conv_general_dilated(
                x.astype(self.conv.dtype),
                kernel,
                window_strides=(1, 1),
                # Of even rows the window lies one up, of odd ones one down; columns likewise.
                padding=((1 - number // 2, number // 2), (1 - number % 2, number % 2)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            for number, kernel in enumerate(jnp.split(self.phases[...], 4, axis=-1))
        ]
        run = functools.partial(interleave, interpret=forms.kernels_interpreted(self.platform))
        run = split_over_batch(run, batched=(*(True for _ in phases), False))
        return run(*phases, self.conv.bias[...]).astype(self.conv.stream_dtype)


def _phase_kernels(kernel: Float[Array, "3 3 C D"]) -> Float[Array, "2 2 C 4D"]:
    """For each parity of row and column, the 2x2 kernel that a 3x3 one is on doubled pixels."""

    def joined(kernel: Array, axis: int, parity: int) -> Array:
        first, second, third = jnp.split(kernel.astype(jnp.float32), 3, axis)
        parts = [first + second, third] if parity else [first, second + third]
        return jnp.concatenate(parts, axis)

    return jnp.concatenate([joined(joined(kernel, 0, i), 1, j) for i in (0, 1) for j in (0, 1)], axis=-1)
