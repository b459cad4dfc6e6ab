"""The image autoencoder: a KL autoencoder of the SDXL layout (docs/model.md, "VAE")."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx, struct
from flax.typing import Dtype
from jaxtyping import Array, Float
from pydantic import Field

from moebius_jax.models import forms
from moebius_jax.models.architecture import ADDED, EXECUTION, Architecture
from moebius_jax.models.blocks import Downsample, Upsample
from moebius_jax.models.convolutions import Conv3x3
from moebius_jax.models.linear import Linear, PointwiseConv, Product
from moebius_jax.models.norms import GROUPS, GroupNorm
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Table
from moebius_jax.schema import Above0, Layers, Platform, Width, checked

Map = Float[Array, "B H W C"]

EPS = 1e-6  # of every GroupNorm
FLOAT16_SCALE = 2.0**-6  # see `VAE.freeze`


@checked
class VAEConfig(Architecture):
    """Sizes of a KL autoencoder of the SDXL layout (docs/model.md, "VAE"); the defaults are the released one.

    Attributes:
        channels: width of each level; every level but the last halves the map.
        layers_per_block: residual blocks of an encoder level; a decoder level has one more.
        latent_channels: of a latent; the encoder yields twice as many (mean, logvar).
        scaling_factor: latents are multiplied by it after encoding, divided before decoding.
        norm_groups: of every GroupNorm. No tensor tells: a file's are taken to be the released 32. With as
            many groups as channels a map's mean, and with it an image's colour, would be normalised away.
        platform: whose forms of a computation are run (`models.forms`); None is the running one's.
    """

    NOUN: ClassVar[str] = "VAE"

    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (128, 256, 512, 512)
    layers_per_block: Layers = 2
    latent_channels: Width = 4
    scaling_factor: Above0 = 0.13025
    norm_groups: Width = dataclasses.field(default=GROUPS, metadata=ADDED)
    platform: Platform | None = dataclasses.field(default=None, metadata=EXECUTION)

    def __post_init__(self) -> None:
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"channels {self.channels}: {width} must be a multiple of norm_groups, {self.norm_groups}"
                )

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side (8 in the release)."""
        return 2 ** (len(self.channels) - 1)


@struct.dataclass
class Posterior:
    """Diagonal Gaussian over latents, before scaling; all [B, h, w, latent_channels], fp32."""

    mean: Float[Array, "B h w c"]
    logvar: Float[Array, "B h w c"]

    @property
    def std(self) -> Float[Array, "B h w c"]:
        return jnp.exp(0.5 * self.logvar)

    def sample(self, noise: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """The draw that standard-normal `noise` stands for."""
        return self.mean + self.std * noise


class VAE(nnx.Module):
    """Encoder and decoder.

    Args:
        config: sizes.
        dtype: compute dtype. Only an `inference_copy` keeps large maps within float16's range.
        param_dtype: dtype the parameters are kept in.
        rngs: the stream "params" draws the initial weights.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        precision = Precision(
            dtype=dtype, stream_dtype=dtype, param_dtype=param_dtype, platform=config.platform
        )
        common = {"precision": precision, "rngs": rngs}
        latents = config.latent_channels
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.encoder = Encoder(config, **common)
        self.decoder = Decoder(config, **common)
        self.quant_conv = PointwiseConv(2 * latents, 2 * latents, **common)
        self.post_quant_conv = PointwiseConv(latents, latents, **common)

    def posterior(self, images: Float[Array, "B H W 3"]) -> Posterior:
        """Encodes images in [-1, 1]; H and W multiples of `config.factor`."""
        moments = self.quant_conv(self.encoder(images.astype(self.dtype)))
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean=mean, logvar=jnp.clip(logvar, -30, 20))

    def encode(
        self, images: Float[Array, "B H W 3"], noise: Float[Array, "B h w c"] | None = None
    ) -> Float[Array, "B h w c"]:
        """Scaled latents: the posterior's mean, or with standard-normal `noise` its sample."""
        posterior = self.posterior(images)
        return self.scaled(posterior.mean if noise is None else posterior.sample(noise))

    def scaled(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Latents as the U-Nets see them: of about unit variance."""
        return latents * self.config.scaling_factor

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Images, nominally in [-1, 1], fp32, of scaled latents."""
        unscaled = (latents / self.config.scaling_factor).astype(self.dtype)
        return self.decoder(self.post_quant_conv(unscaled)).astype(jnp.float32)

    def freeze(self) -> None:
        """For inference in float16: maps are carried at 1/64 of their size.

        The released decoder's reach beyond 65,504. But only GroupNorms, which do not care for a factor (their
        ε is divided by its square), and linear layers read them, whose biases are made smaller too. So the
        function stays what it is, to the last bit where nothing is rounded.
        """
        if self.dtype != jnp.float16 or self.encoder.scale != 1:
            return
        for half in (self.encoder, self.decoder):
            for path, module in nnx.iter_modules(half):
                if isinstance(module, GroupNorm):
                    module.epsilon *= FLOAT16_SCALE**2
                elif isinstance(module, Encoder | Decoder | ResnetBlock | Attention):
                    module.scale = FLOAT16_SCALE
                elif path[-1] not in {"conv_out", "to_q", "to_k", "to_v"} and hasattr(module, "bias"):
                    module.bias = nnx.Param(module.bias[...] * FLOAT16_SCALE)


class ResnetBlock(nnx.Module):
    """GN → SiLU → 3x3 → GN → SiLU → 3x3, + shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        common = {"precision": precision, "rngs": rngs}
        norm = {"groups": groups, "eps": EPS, **common}
        self.norm1 = GroupNorm(in_channels, **norm)
        self.conv1 = Conv3x3(in_channels, out_channels, **common)
        self.norm2 = GroupNorm(out_channels, **norm)
        self.conv2 = Conv3x3(out_channels, out_channels, **common)
        self.conv_shortcut = (
            PointwiseConv(in_channels, out_channels, **common) if in_channels != out_channels else None
        )
        self.scale = 1.0

    def __call__(self, x: Map) -> Map:
        y = self.conv1(self.norm1(x, then=self.activated))
        shortcut = x if self.conv_shortcut is None else Product(x, self.conv_shortcut)
        return self.conv2(self.norm2(y, then=self.activated), add=(shortcut,))

    def activated(self, y: Map) -> Map:
        """SiLU, of the size the next map is carried at."""
        return jax.nn.silu(y) * self.scale


class Attention(nnx.Module):
    """Each position looks at all, with one head: x += out(softmax(q·kᵀ/√C) v), of GN(x)."""

    RELEASED: ClassVar[Table] = {"to_out": "to_out.0"}

    def __init__(self, channels: int, *, groups: int, precision: Precision, rngs: nnx.Rngs) -> None:
        common = {"precision": precision, "rngs": rngs}
        self.group_norm = GroupNorm(channels, groups=groups, eps=EPS, **common)
        self.to_q = Linear(channels, channels, **common)
        self.to_k = Linear(channels, channels, **common)
        self.to_v = Linear(channels, channels, **common)
        self.to_out = Linear(channels, channels, **common)
        self.platform = precision.platform
        self.scale = 1.0

    def __call__(self, x: Map) -> Map:
        B, _, _, C = x.shape
        y = self.group_norm(x)
        q, k, v = (layer(y).reshape(B, -1, C) for layer in (self.to_q, self.to_k, self.to_v))
        logits = jnp.einsum("bnd,bld->bnl", q * C**-0.5, k, preferred_element_type=jnp.float32)
        if forms.softmax_divided_last(self.platform):
            weights = jnp.exp(logits - logits.max(-1, keepdims=True))
            y = jnp.einsum("bnl,bld->bnd", weights, v, preferred_element_type=jnp.float32)
            y = (y / weights.sum(-1, keepdims=True)).astype(v.dtype)
        else:
            y = jnp.einsum("bnl,bld->bnd", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)
        y = y.reshape(x.shape)
        return self.to_out(y * self.scale, add=(x,))


class MidBlock(nnx.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int, *, groups: int, precision: Precision, rngs: nnx.Rngs) -> None:
        common = {"groups": groups, "precision": precision, "rngs": rngs}
        self.resnets = nnx.List([ResnetBlock(channels, channels, **common) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, **common)])

    def __call__(self, x: Map) -> Map:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """Residual blocks, then the map halved or doubled (not on the last level of either half)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        resample: Downsample | Upsample | None,
        *,
        groups: int,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        widths = [in_channels, *[channels] * (blocks - 1)]
        common = {"groups": groups, "precision": precision, "rngs": rngs}
        self.resnets = nnx.List([ResnetBlock(width, channels, **common) for width in widths])
        self.resample = resample

    def __call__(self, x: Map) -> Map:
        for block in self.resnets:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class DownLevel(Level):
    """Of the encoder."""

    RELEASED: ClassVar[Table] = {"resample": "downsamplers.0"}


class UpLevel(Level):
    """Of the decoder."""

    RELEASED: ClassVar[Table] = {"resample": "upsamplers.0"}


class Encoder(nnx.Module):
    """3x3 → levels, each but the last halving the map → middle → GN → SiLU → 3x3, to twice the latents."""

    def __init__(self, config: VAEConfig, *, precision: Precision, rngs: nnx.Rngs) -> None:
        common = {"precision": precision, "rngs": rngs}
        normed = {"groups": config.norm_groups, **common}
        widths = config.channels
        self.conv_in = Conv3x3(3, widths[0], **common)
        # The release pads only below and on the right before it halves a map.
        down = [Downsample(width, padding=((0, 1), (0, 1)), **common) for width in widths[:-1]]
        self.down_blocks = nnx.List(
            [
                DownLevel(before, width, config.layers_per_block, resample, **normed)
                for before, width, resample in zip((widths[0], *widths), widths, (*down, None), strict=False)
            ]
        )
        self.mid_block = MidBlock(widths[-1], **normed)
        self.conv_norm_out = GroupNorm(widths[-1], eps=EPS, **normed)
        self.conv_out = Conv3x3(widths[-1], 2 * config.latent_channels, **common)
        self.scale = 1.0

    def __call__(self, images: Map) -> Map:
        x = self.conv_in(images * self.scale)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), then=jax.nn.silu))


class Decoder(nnx.Module):
    """3x3 → middle → levels, each but the last doubling the map → GN → SiLU → 3x3, to an image."""

    def __init__(self, config: VAEConfig, *, precision: Precision, rngs: nnx.Rngs) -> None:
        common = {"precision": precision, "rngs": rngs}
        normed = {"groups": config.norm_groups, **common}
        widths = config.channels[::-1]
        self.conv_in = Conv3x3(config.latent_channels, widths[0], **common)
        self.mid_block = MidBlock(widths[0], **normed)
        up = [Upsample(width, **common) for width in widths[:-1]]
        self.up_blocks = nnx.List(
            [
                UpLevel(before, width, config.layers_per_block + 1, resample, **normed)
                for before, width, resample in zip((widths[0], *widths), widths, (*up, None), strict=False)
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], eps=EPS, **normed)
        self.conv_out = Conv3x3(widths[-1], 3, **common)
        self.scale = 1.0

    def __call__(self, latents: Map) -> Map:
        x = self.mid_block(self.conv_in(latents * self.scale))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x, then=jax.nn.silu))
