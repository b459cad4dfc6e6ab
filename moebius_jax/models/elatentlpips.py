"""The network of E-LatentLPIPS: VGG16-BN features of 4-channel latents and one linear head per tap."""

import re
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float
from pydantic import Field

from moebius_jax.models.architecture import Architecture
from moebius_jax.models.convolutions import Conv3x3
from moebius_jax.models.linear import PointwiseConv
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.precision import Precision
from moebius_jax.schema import AtLeastOne, checked

POOLED_GROUPS = (3, 4)  # VGG16 pools after all five groups; the metric drops the first three pools


Group = Annotated[tuple[AtLeastOne, ...], Field(min_length=1)]


@checked
class ELatentLPIPSConfig(Architecture):
    """Widths of the convolutions of each of the five groups; the defaults are the released network."""

    NOUN: ClassVar[str] = "E-LatentLPIPS network"

    in_channels: AtLeastOne = 4
    groups: Annotated[tuple[Group, ...], Field(min_length=1)] = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )


class ConvNormRelu(nnx.Module):
    """3x3 convolution with bias → BatchNorm → ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, precision: Precision, rngs: nnx.Rngs) -> None:
        self.conv = Conv3x3(in_channels, out_channels, precision=precision, rngs=rngs)
        self.norm = BatchNorm(out_channels, precision=precision)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return jax.nn.relu(self.norm(self.conv(x)))


class ELatentLPIPS(nnx.Module):
    """Perceptual distance of two latents, without transforms and input scaling (docs/distillation.md)."""

    def __init__(
        self,
        config: ELatentLPIPSConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        common = {"precision": Precision(dtype=dtype, param_dtype=param_dtype), "rngs": rngs}
        self.config = config
        groups, heads = [], []
        width = config.in_channels
        for widths in config.groups:
            layers = []
            for out in widths:
                layers.append(ConvNormRelu(width, out, **common))
                width = out
            groups.append(nnx.List(layers))
            heads.append(PointwiseConv(width, 1, use_bias=False, **common))
        self.groups = nnx.List(groups)
        self.heads = nnx.List(heads)
        self.eval()

    def released_names(self, name: str) -> tuple[str, ...]:
        """A tensor's names in the release, from its dotted name here.

        torchvision numbers VGG16-BN's layers conv, norm, relu, … with one number for each pool; released
        files hold each head twice.
        """
        if match := re.fullmatch(r"heads\.(\d+)\.weight", name):
            return tuple(f"{head}.model.1.weight" for head in (f"lin{match[1]}", f"lins.{match[1]}"))
        group, layer, part, leaf = re.fullmatch(r"groups\.(\d+)\.(\d+)\.(conv|norm)\.(\w+)", name).groups()
        before = sum(3 * len(widths) + 1 for widths in self.config.groups[: int(group)])
        return (f"net.slice{int(group) + 1}.{before + 3 * int(layer) + (part == 'norm')}.{leaf}",)

    def features(self, latents: Float[Array, "B H W 4"]) -> list[Float[Array, "B h w C"]]:
        """The five taps, each divided by √(Σ_c f² + 1e-8)."""
        taps = []
        x = latents
        for i, group in enumerate(self.groups):
            for layer in group:
                x = layer(x)
            if i in POOLED_GROUPS:
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            taps.append(x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-8))
        return taps

    def __call__(self, a: Float[Array, "B H W 4"], b: Float[Array, "B H W 4"]) -> Float[Array, "5 B"]:
        """Distance per tap and item; their sum over taps is the metric's network part."""
        pairs = zip(self.features(a), self.features(b), self.heads, strict=True)
        return jnp.stack([head(jnp.square(fa - fb)).mean((1, 2, 3)) for fa, fb, head in pairs])
