"""What a U-Net is made of: four switches and the sizes, frozen and checked."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Int

from moebius_jax.models.architecture import ADDED, EXECUTION, Architecture
from moebius_jax.models.parts import BlockSizes, Sizes
from moebius_jax.models.switches import CROSS_MIXERS, FEED_FORWARDS, RESIDUAL_CONVS, SELF_MIXERS, SWITCHES
from moebius_jax.models.table2 import TABLE_2, experiment
from moebius_jax.schema import Layers, Side, Width, checked, one_of

PredictionType = Literal["epsilon", "v_prediction"]  # diffusers' names


@checked
class UNetConfig(Architecture, Sizes):
    """Architecture of one latent U-Net (docs/model.md, "One U-Net, four switches").

    The defaults are the released student. `student()`, `teacher()` and `ablation(n)` name the published
    networks.

    Attributes:
        self_mixer, cross_mixer, feed_forward, residual_conv: the four switches, see `models.switches`.
        channels: width of each level; every level but the last halves the map.
        transformers: for each level, whether its residual blocks are followed by transformers.
        mid_block: whether residual, transformer, residual sit between the two halves.
        layers_per_block: residual blocks of a down level; an up level has one more.
        latent_size: side of the square latent map the network was trained at (512 px: 64). Only
            Interactive-λ depends on it: its position table has latent_size² rows at level 0.
        in_channels, out_channels: 9 = noisy latents 4 + mask 1 + masked-image latents 4; 4.
        vocab_size, embedding_dim: the table of category embeddings.
        prediction_type: what the output is, see `diffusion.prediction`; the released networks predict the
            noise, "epsilon".
        remat: recompute each residual block and transformer in the backward pass instead of storing it.

    Raises:
        ValueError: a field is out of range or two fields contradict each other.
    """

    NOUN: ClassVar[str] = "U-Net"

    self_mixer: Annotated[str, one_of(SELF_MIXERS)] = "local_lambda"
    cross_mixer: Annotated[str, one_of(CROSS_MIXERS)] = "interactive_lambda"
    feed_forward: Annotated[str, one_of(FEED_FORWARDS)] = "mix_ffn"
    residual_conv: Annotated[str, one_of(RESIDUAL_CONVS)] = "depthwise"
    channels: tuple[Width, ...] = (320, 640, 1280)
    transformers: tuple[bool, ...] = (True, True, True)
    mid_block: bool = False
    layers_per_block: Layers = 2
    latent_size: Side = 64
    in_channels: Width = 9
    out_channels: Width = 4
    vocab_size: Width = 20
    embedding_dim: Width = 3072
    prediction_type: PredictionType = dataclasses.field(default="epsilon", metadata=ADDED)
    remat: bool = dataclasses.field(default=False, metadata=EXECUTION)

    def __post_init__(self) -> None:
        self._check_levels()
        if self.window % 2 == 0:
            raise ValueError(f"window is {self.window}; it must be odd")
        if self.vocab_size < 2 * self.context_length:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; two categories of context_length {self.context_length} "
                f"need at least {2 * self.context_length}"
            )
        if self.in_channels != 2 * self.out_channels + 1:
            raise ValueError(
                f"in_channels is {self.in_channels}; noisy latents, mask and masked-image latents of "
                f"out_channels {self.out_channels} are {2 * self.out_channels + 1}"
            )

    def _check_levels(self) -> None:
        if not self.channels:
            raise ValueError("channels is empty; a U-Net has at least one level")
        if len(self.transformers) != len(self.channels):
            raise ValueError(
                f"transformers has {len(self.transformers)} entries for {len(self.channels)} levels"
            )
        for width in self.channels:
            if width % 32 or width % (2 * self.num_heads):
                raise ValueError(
                    f"channels {self.channels}: {width} must be a multiple of 32 (GroupNorm groups) "
                    f"and of {2 * self.num_heads} (2 x num_heads)"
                )
        if self.latent_size % 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"latent_size {self.latent_size} cannot be halved {len(self.channels) - 1} times"
            )

    @classmethod
    def student(cls, **changes: Any) -> UNetConfig:
        """The released Moebius student, 226,041,531 parameters (paper Table 2, exp 9 and 10)."""
        return cls(**changes)

    @classmethod
    def teacher(cls, **changes: Any) -> UNetConfig:
        """The PixelHacker teacher, 862,251,708 parameters."""
        return cls(
            **{
                "self_mixer": "gla",
                "cross_mixer": "attention",
                "feed_forward": "geglu",
                "residual_conv": "conv3x3",
                "channels": (320, 640, 1280, 1280),
                "transformers": (True, True, True, False),
                "mid_block": True,
                **changes,
            }
        )

    @classmethod
    def ablation(cls, number: int, **changes: Any) -> UNetConfig:
        """The network of row `number` (1 to 15) of the paper's Table 2; rows may differ in training only."""
        return cls(**{**experiment(number).switches, **changes})

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of the latents the network was trained at."""
        return self.latent_size, self.latent_size, self.out_channels

    @property
    def is_bound_to_latent_size(self) -> bool:
        """Whether it runs at `latent_size` alone: the teacher's mixers, attention and GLA, take any size."""
        return (self.self_mixer, self.cross_mixer) != ("gla", "attention")

    @property
    def category_ids(self) -> Int[np.ndarray, "2 L"]:
        """Rows of the embedding table by category: [0] background (0..9 of ten tokens), [1] foreground.

        In guidance background is the condition and foreground the unconditional branch.
        """
        return np.arange(2 * self.context_length, dtype=np.int32).reshape(2, -1)

    @property
    def switches(self) -> tuple[str, ...]:
        """The settings of the four switches."""
        return tuple(getattr(self, name) for name in SWITCHES)

    def block(self, channels: int, map_size: int) -> BlockSizes:
        """What the parts of a transformer at this width and side are built from."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(Sizes)}
        return BlockSizes(channels=channels, map_size=map_size, **shared)

    def describe(self) -> str:
        if (self.switches, self.mid_block) == (UNetConfig.teacher().switches, True):
            return "teacher"
        if self.mid_block:
            return self.NOUN
        if self.switches == UNetConfig.student().switches:
            return "student"
        rows = [n for n, row in TABLE_2.items() if tuple(row.switches.values()) == self.switches]
        return f"ablation {rows[0]}" if rows else self.NOUN
