"""The latent U-Net: teacher, student and every ablation, told apart by a `UNetConfig`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Shaped

from moebius_jax.models.blocks import Downsample, ResidualBlock, Transformer, Upsample
from moebius_jax.models.config import UNetConfig
from moebius_jax.models.embeddings import TimestepEmbedding
from moebius_jax.models.linear import Linear
from moebius_jax.models.norms import GroupNorm
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Released, Table
from moebius_jax.models.switches import RESIDUAL_CONVS

Map = Float[Array, "B H W C"]


@struct.dataclass
class UNetOutput:
    """What a U-Net call returns.

    Attributes:
        sample: predicted noise ε, or what `prediction_type` says; fp32 [B, H, W, 4].
        features: each down level's output after its downsampler, then the mid block's if there is one, then
            each up level's after its upsampler; [B, H_i, W_i, C_i].
    """

    sample: Float[Array, "B H W 4"]
    features: tuple[Map, ...]


@struct.dataclass
class Halfway:
    """What the down half hands to the up half.

    Attributes:
        x: the last down level's output, also the last skip connection.
        skips: the other skip connections, oldest first.
        embeddings: of the call's timesteps and category tokens.
    """

    x: Map
    skips: tuple[Map, ...]
    embeddings: "Embeddings"


@struct.dataclass
class Embeddings:
    """Of timesteps and of category tokens."""

    time: Float[Array, "B D"]
    context: Float[Array, "B L D"]


@struct.dataclass
class Conditions:
    """What the blocks of one half take beside the map. It does not depend on the latents.

    Attributes:
        shifts: of all residual blocks, one after the other on the last axis; of length 1 on the first they
            are those of all items.
        contexts: what each transformer's cross mixer made of the context.
    """

    shifts: Float[Array, "B S"]
    contexts: tuple[Any, ...]


@struct.dataclass
class DownTaps:
    """What distillation looks at in the down half, beside its result.

    Attributes:
        features: each level's output, [B, H_i, W_i, C_i].
        bottleneck_input: what the last transformer's `proj_out` (θ_C) multiplies, [B, H, W, C]; None where
            the last level has no transformers.
    """

    features: tuple[Map, ...]
    bottleneck_input: Map | None


class Level(nnx.Module):
    """One level of either half: residual blocks, each followed by a transformer where the level has them."""

    RESAMPLE: ClassVar[type[Downsample] | type[Upsample]]

    def __init__(
        self,
        widths: list[tuple[int, int]],
        map_size: int,
        config: UNetConfig,
        *,
        has_transformers: bool,
        is_last: bool,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        """`widths` are the (in, out) channels of the residual blocks; the last level keeps the map's size."""
        common = {"precision": precision, "rngs": rngs}
        self.resnets = nnx.List([ResidualBlock(a, b, config, **common) for a, b in widths])
        transformers = (
            [Transformer(b, map_size, config, **common) for _, b in widths] if has_transformers else []
        )
        self.attentions = nnx.List(transformers)
        self.resample = None if is_last else self.RESAMPLE(widths[-1][1], **common)

    def unit(self, index: int, x: Map, conditions: "_HandedOut", *, skip: Map | None = None) -> Map:
        """Residual block `index` and its transformer."""
        x = self.resnets[index](x, next(conditions.shifts), skip=skip)
        return self.attentions[index](x, next(conditions.contexts)) if self.attentions else x


class DownLevel(Level):
    """Ends in `Downsample`."""

    RELEASED: ClassVar[Table] = {"resample": "downsamplers.0"}
    RESAMPLE = Downsample


class UpLevel(Level):
    """Ends in `Upsample`."""

    RELEASED: ClassVar[Table] = {"resample": "upsamplers.0"}
    RESAMPLE = Upsample


class MidBlock(nnx.Module):
    """Residual, transformer, residual at the lowest resolution (teacher only)."""

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
        self.resnets = nnx.List([ResidualBlock(channels, channels, config, **common) for _ in range(2)])
        self.attentions = nnx.List([Transformer(channels, map_size, config, **common)])

    def __call__(self, x: Map, conditions: "_HandedOut") -> Map:
        x = self.attentions[0](self.resnets[0](x, next(conditions.shifts)), next(conditions.contexts))
        return self.resnets[1](x, next(conditions.shifts))


class Embedding(nnx.Embed):
    """Rows of a table, drawn from N(0, 1)."""

    RELEASED: ClassVar[Table] = {"embedding": Released("weight")}


class UNet(nnx.Module):
    """ε(latents, t, category) (docs/model.md, "One U-Net, four switches").

    `train()` and `eval()` switch BatchNorm between batch and running statistics; a new network is in
    training mode, a loaded one in evaluation mode.

    Args:
        config: the architecture.
        dtype: compute dtype of the bulk of the products, see `Precision`.
        param_dtype: dtype the parameters are kept in.
        stream_dtype: dtype of everything between them; equal to `dtype`, the network is faster and rougher.
        rngs: the stream "params" draws the initial weights.
    """

    # Muon is for hidden matrices: not for the table, nor for what touches the latents.
    RELEASED: ClassVar[Table] = {
        "embedding": Released("embedding_layer", muon=False),
        "conv_in": Released("diff_model.conv_in", muon=False),
        "conv_out": Released("diff_model.conv_out", muon=False),
        **{
            part: f"diff_model.{part}"
            for part in (
                "encoder_hid_proj",
                "time_embedding",
                "down_blocks",
                "mid_block",
                "up_blocks",
                "conv_norm_out",
            )
        },
    }

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        stream_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        precision = Precision(
            dtype=dtype, stream_dtype=stream_dtype, param_dtype=param_dtype, platform=config.platform
        )
        common = {"precision": precision, "rngs": rngs}
        thin = {"precision": precision.thin(), "rngs": rngs}
        conv = RESIDUAL_CONVS[config.residual_conv]
        self.config = config
        self.precision = precision
        first, levels = config.channels[0], len(config.channels)
        self.embedding = Embedding(
            config.vocab_size,
            config.embedding_dim,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=stream_dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.encoder_hid_proj = Linear(config.embedding_dim, config.context_dim, thin=True, **common)
        self.time_embedding = TimestepEmbedding(first, **common)
        self.conv_in = conv(config.in_channels, first, **thin)
        down, up = _level_widths(config)
        sizes = [config.latent_size // 2**i for i in range(levels)]

        def level(kind: type[Level], widths: list[tuple[int, int]], depth: int, is_last: bool) -> Level:
            has_transformers = config.transformers[depth]
            return kind(
                widths, sizes[depth], config, has_transformers=has_transformers, is_last=is_last, **common
            )

        self.down_blocks = nnx.List(
            [level(DownLevel, widths, i, i == levels - 1) for i, widths in enumerate(down)]
        )
        self.mid_block = (
            MidBlock(config.channels[-1], sizes[-1], config, **common) if config.mid_block else None
        )
        self.up_blocks = nnx.List(
            [level(UpLevel, widths, levels - 1 - i, i == levels - 1) for i, widths in enumerate(up)]
        )
        self.conv_norm_out = GroupNorm(first, eps=1e-5, **common)
        self.conv_out = conv(first, config.out_channels, **thin)

    def __call__(
        self,
        latents: Float[Array, "B H W c"],
        timesteps: Shaped[Array, " B"],
        input_ids: Int[Array, "B L"],
    ) -> UNetOutput:
        """Predicts the noise in `latents`.

        Args:
            latents: [noisy latents 4, mask 1 (1 = hole), masked-image latents 4] on the last axis.
            timesteps: 0 to 999, one per item.
            input_ids: rows of the category table; see `UNetConfig.category_ids`.

        Raises:
            ValueError: the map cannot be halved once per level, or Interactive-λ was trained at another size.
        """
        return self.predict(latents, self.conditions(timesteps, input_ids))

    def conditions(
        self, timesteps: Shaped[Array, " T"], input_ids: Int[Array, "B L"]
    ) -> tuple[Conditions, Conditions]:
        """What both halves take of the timesteps and categories, for `predict`.

        A sampler works it out once, for all T of its timesteps, and hands over a row of shifts at each step.
        """
        embeddings = self._embeddings(timesteps, input_ids)
        return _conditions(self._lower, embeddings), _conditions(self._upper, embeddings)

    def predict(self, latents: Float[Array, "B H W c"], conditions: Sequence[Conditions]) -> UNetOutput:
        """A call whose `conditions` are there already."""
        lower, upper = conditions
        x, skips, taps = self._down(latents, lower)
        x, features = self._up(x, skips, upper)
        return UNetOutput(sample=self.head(x), features=(*taps.features, *features))

    def down(
        self,
        latents: Float[Array, "B H W c"],
        timesteps: Shaped[Array, " B"],
        input_ids: Int[Array, "B L"],
    ) -> tuple[Halfway, DownTaps]:
        """Everything up to the bottleneck; arguments as for a call."""
        embeddings = self._embeddings(timesteps, input_ids)
        x, skips, taps = self._down(latents, _conditions(self._lower, embeddings))
        return Halfway(x=x, skips=skips, embeddings=embeddings), taps

    def up(self, halfway: Halfway) -> tuple[Map, tuple[Map, ...]]:
        """From the bottleneck to the last map before the head; with the mid block's and levels' outputs."""
        return self._up(halfway.x, halfway.skips, _conditions(self._upper, halfway.embeddings))

    @property
    def _lower(self) -> list[Level]:
        return list(self.down_blocks)

    @property
    def _upper(self) -> list[Level | MidBlock]:
        return [*([self.mid_block] if self.mid_block is not None else []), *self.up_blocks]

    def _embeddings(self, timesteps: Shaped[Array, " T"], input_ids: Int[Array, "B L"]) -> Embeddings:
        context = self.encoder_hid_proj(self.embedding(input_ids))
        return Embeddings(time=self.time_embedding(timesteps), context=context)

    def _down(
        self, latents: Float[Array, "B H W c"], conditions: Conditions
    ) -> tuple[Map, tuple[Map, ...], DownTaps]:
        _check_map(latents.shape, self.config)
        handed = _HandedOut(conditions, self._lower)
        x = self.conv_in(latents.astype(self.precision.stream_dtype))
        skips, features, hidden = [x], [], None
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                if level is self.down_blocks[-1] and level.attentions and i == len(level.resnets) - 1:
                    x = level.resnets[i](x, next(handed.shifts))
                    hidden = level.attentions[i].hidden(x, next(handed.contexts))
                    x = level.attentions[i].proj_out(hidden, add=(x,))
                else:
                    x = level.unit(i, x, handed)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
            features.append(x)
        return x, tuple(skips[:-1]), DownTaps(features=tuple(features), bottleneck_input=hidden)

    def _up(
        self, x: Map, older_skips: tuple[Map, ...], conditions: Conditions
    ) -> tuple[Map, tuple[Map, ...]]:
        handed = _HandedOut(conditions, self._upper)
        skips, features = [*older_skips, x], []
        if self.mid_block is not None:
            x = self.mid_block(x, handed)
            features.append(x)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.unit(i, x, handed, skip=skips.pop())
            if level.resample is not None:
                x = level.resample(x)
            features.append(x)
        return x, tuple(features)

    def head(self, x: Map) -> Float[Array, "B H W 4"]:
        """The predicted noise, fp32, of the last map."""
        return self.conv_out(self.conv_norm_out(x, then=jax.nn.silu)).astype(jnp.float32)


class _HandedOut:
    """The conditions of one half, each taken when its block's turn comes."""

    def __init__(self, conditions: Conditions, levels: list[Level | MidBlock]) -> None:
        ends = np.cumsum([block.time_emb_proj.out_features for level in levels for block in level.resnets])
        self.shifts = iter(jnp.split(conditions.shifts, ends[:-1], axis=-1))
        self.contexts = iter(conditions.contexts)


def _conditions(levels: list[Level | MidBlock], embeddings: Embeddings) -> Conditions:
    """For these levels, in the order their blocks run."""
    shifts = [block.shift(embeddings.time) for level in levels for block in level.resnets]
    contexts = [block.prepare(embeddings.context) for level in levels for block in level.attentions]
    return Conditions(shifts=jnp.concatenate(shifts, axis=-1), contexts=tuple(contexts))


def _level_widths(config: UNetConfig) -> tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
    """(in, out) channels of every residual block: of the down levels, then of the up levels."""
    x = config.channels[0]
    skips = [x]
    down = []
    for i, width in enumerate(config.channels):
        down.append([(x if j == 0 else width, width) for j in range(config.layers_per_block)])
        last = i == len(config.channels) - 1
        skips += [width] * (config.layers_per_block + (not last))
        x = width
    up = []
    for width in reversed(config.channels):
        level = []
        for _ in range(config.layers_per_block + 1):
            level.append((x + skips.pop(), width))
            x = width
        up.append(level)
    return down, up


def _check_map(shape: tuple[int, ...], config: UNetConfig) -> None:
    factor = 2 ** (len(config.channels) - 1)
    if len(shape) != 4 or shape[-1] != config.in_channels or shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"latents have shape {tuple(shape)}; expected [B, H, W, {config.in_channels}] with H and W "
            f"multiples of {factor}"
        )
