"""What a U-Net is made of: four switches and the sizes, frozen and checked."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

SelfMixer = Literal["local_lambda", "gla"]
CrossMixer = Literal["interactive_lambda", "attention"]
FeedForward = Literal["mix_ffn", "geglu"]
ResidualConv = Literal["depthwise", "conv3x3"]
PositionOrder = Literal["auto", "conv3d", "conv2d_batch", "conv2d_groups", "toeplitz", "banded", "dense"]

_EXECUTION = {"execution": True}  # marks fields that choose how to compute, not what


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Architecture of one latent U-Net (spec: "One U-Net, four switches").

    The defaults are the released student. `student()`, `teacher()` and `ablation(n)` name
    the published networks.

    Attributes:
        self_mixer, cross_mixer, feed_forward, residual_conv: the four switches.
        channels: width of each level; every level but the last halves the map.
        transformers: for each level, whether its residual blocks are followed by transformers.
        mid_block: whether residual, transformer, residual sit between the two halves.
        layers_per_block: residual blocks of a down level; an up level has one more.
        num_heads: heads h of both mixers; a level of width C has k = v = C/h.
        latent_size: side of the square latent map the network was trained at (512 px: 64).
            Only Interactive-λ depends on it: its position table has latent_size² rows at level 0.
        in_channels, out_channels: 9 = noisy latents 4 + mask 1 + masked-image latents 4; 4.
        vocab_size, embedding_dim: the table of category embeddings.
        context_dim, context_length: width and number of the context tokens.
        window: side of Local-λ's position window, odd.
        ffn_ratio: Mix-FFN's hidden width is int(ffn_ratio · C).
        position_order: evaluation order of Local-λ's position term; "auto" picks by map size and
            platform. Never changes the function.
        platform: the platform "auto" picks for; None is the running one. Needed only when
            compiling for another machine.
        remat: recompute each transformer in the backward pass instead of storing it.

    Raises:
        ValueError: a field is out of range or two fields contradict each other.
    """

    self_mixer: SelfMixer = "local_lambda"
    cross_mixer: CrossMixer = "interactive_lambda"
    feed_forward: FeedForward = "mix_ffn"
    residual_conv: ResidualConv = "depthwise"
    channels: tuple[int, ...] = (320, 640, 1280)
    transformers: tuple[bool, ...] = (True, True, True)
    mid_block: bool = False
    layers_per_block: int = 2
    num_heads: int = 8
    latent_size: int = 64
    in_channels: int = 9
    out_channels: int = 4
    vocab_size: int = 20
    embedding_dim: int = 3072
    context_dim: int = 768
    context_length: int = 10
    window: int = 15
    ffn_ratio: float = 2.5
    position_order: PositionOrder = dataclasses.field(default="auto", metadata=_EXECUTION)
    platform: str | None = dataclasses.field(default=None, metadata=_EXECUTION)
    remat: bool = dataclasses.field(default=False, metadata=_EXECUTION)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        for name in _POSITIVE:
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "transformers", tuple(self.transformers))
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
        if self.window % 2 == 0:
            raise ValueError(f"window is {self.window}; it must be odd")
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
    def ablation(cls, experiment: int, **changes: Any) -> UNetConfig:
        """Row `experiment` (1 to 15) of the paper's Table 2.

        Rows 7 and 10 to 15 repeat an architecture and differ in how it was trained.
        """
        row = {7: 6, 10: 9, 11: 1, 12: 2, 13: 3, 14: 4, 15: 5}.get(experiment, experiment)
        if row not in _ABLATIONS:
            raise ValueError(f"experiment is {experiment}; Table 2 has rows 1 to 15")
        switches = dict(
            zip(("self_mixer", "cross_mixer", "feed_forward", "residual_conv"), _ABLATIONS[row], strict=True)
        )
        return cls(**{**switches, **changes})

    def replace(self, **changes: Any) -> UNetConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The architecture as JSON-ready values; execution choices are left out."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v
            for f in dataclasses.fields(self)
            if not f.metadata.get("execution")
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown or missing field.
        """
        known = {f.name for f in dataclasses.fields(cls) if not f.metadata.get("execution")}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown U-Net config field {', '.join(unknown)}")
        if missing := sorted(known - set(values)):
            raise ValueError(f"missing U-Net config field {', '.join(missing)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


_CHOICES = {
    "self_mixer": get_args(SelfMixer),
    "cross_mixer": get_args(CrossMixer),
    "feed_forward": get_args(FeedForward),
    "residual_conv": get_args(ResidualConv),
    "position_order": get_args(PositionOrder),
}

_POSITIVE = (
    "layers_per_block",
    "num_heads",
    "latent_size",
    "in_channels",
    "out_channels",
    "vocab_size",
    "embedding_dim",
    "context_dim",
    "context_length",
    "window",
)

_ABLATIONS = {
    1: ("gla", "attention", "geglu", "conv3x3"),
    2: ("local_lambda", "attention", "geglu", "conv3x3"),
    3: ("gla", "interactive_lambda", "geglu", "conv3x3"),
    4: ("gla", "attention", "mix_ffn", "conv3x3"),
    5: ("gla", "attention", "geglu", "depthwise"),
    6: ("local_lambda", "interactive_lambda", "geglu", "conv3x3"),
    8: ("local_lambda", "interactive_lambda", "geglu", "depthwise"),
    9: ("local_lambda", "interactive_lambda", "mix_ffn", "depthwise"),
}
