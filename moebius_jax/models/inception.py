"""InceptionV3 as FID knows it: the network of TensorFlow's 2015 release, in pytorch-fid's port.

It differs from torchvision's InceptionV3 in its pooling branches: averages leave the padding out, and the
last block takes the maximum instead. Figures of other variants do not compare.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from moebius_jax.models.architecture import Architecture
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import CONV, LINEAR, Released, Table
from moebius_jax.schema import AtLeastOne, checked

Map = Float[Array, "B H W C"]

SIDE = 299  # of the input, in pixels


@checked
class InceptionConfig(Architecture):
    """The one size that varies: classes of the last layer, which FID does not use (1008 in its file)."""

    NOUN: ClassVar[str] = "Inception network"

    classes: AtLeastOne = 1008


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution of a block; `padded`: at stride 1 the map keeps its size."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


@dataclasses.dataclass(frozen=True)
class Branch:
    """Steps in a row, each of convolutions side by side; before them perhaps a pooling."""

    steps: tuple[tuple[Conv, ...], ...] = ()
    pool: str | None = None


class BareConv(nnx.Conv):
    """Convolution without bias."""

    RELEASED: ClassVar[Table] = {"kernel": Released("weight", CONV)}


class ConvNormRelu(nnx.Module):
    """Convolution without bias → BatchNorm (ε = 0.001) → ReLU."""

    RELEASED: ClassVar[Table] = {"norm": "bn"}

    def __init__(self, in_channels: int, spec: Conv, *, precision: Precision, rngs: nnx.Rngs) -> None:
        self.conv = BareConv(
            in_channels,
            spec.width,
            spec.kernel,
            strides=spec.stride,
            padding=tuple((k // 2, k // 2) if spec.padded else (0, 0) for k in spec.kernel),
            use_bias=False,
            dtype=precision.dtype,
            param_dtype=precision.param_dtype,
            # A metric: three digits less would be another metric.
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )
        self.norm = BatchNorm(spec.width, eps=1e-3, precision=precision)

    def __call__(self, x: Map) -> Map:
        return jax.nn.relu(self.norm(self.conv(x)))


class Mixed(nnx.Module):
    """Branches on one map, their results joined by channels."""

    def __init__(
        self, in_channels: int, branches: tuple[Branch, ...], *, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        self.branches = branches
        self.width = 0
        for branch in branches:
            width = in_channels
            for step in branch.steps:
                for spec in step:
                    setattr(self, spec.name, ConvNormRelu(width, spec, precision=precision, rngs=rngs))
                width = sum(spec.width for spec in step)
            self.width += width

    def __call__(self, x: Map) -> Map:
        return jnp.concatenate([self._branch(branch, x) for branch in self.branches], axis=-1)

    def _branch(self, branch: Branch, x: Map) -> Map:
        if branch.pool:
            x = _POOLS[branch.pool](x)
        for step in branch.steps:
            x = jnp.concatenate([getattr(self, spec.name)(x) for spec in step], axis=-1)
        return x


class Classes(nnx.Linear):
    """The last layer. FID does not use it; kept so that a released file converts without remainder."""

    RELEASED: ClassVar[Table] = {"kernel": Released("weight", LINEAR)}


class Inception(nnx.Module):
    """InceptionV3 up to its last map, with pytorch-fid's names.

    Args:
        config: sizes.
        dtype, param_dtype: of the computation and of the weights.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        config: InceptionConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        common = {"precision": Precision(dtype=dtype, param_dtype=param_dtype), "rngs": rngs}
        self.config = config
        width = 3
        for layer in _STEM:
            if isinstance(layer, Conv):
                setattr(self, layer.name, ConvNormRelu(width, layer, **common))
                width = layer.width
        for name, branches in _BLOCKS.items():
            block = Mixed(width, branches, **common)
            setattr(self, name, block)
            width = block.width
        self.fc = Classes(width, config.classes, param_dtype=param_dtype, rngs=rngs)
        self.eval()

    def released_names(self, name: str) -> tuple[str, ...]:
        """A tensor's name in pytorch-fid's file, from its dotted name here."""
        return (name if name.startswith("fc.") else name[0].upper() + name[1:],)

    def __call__(self, images: Float[Array, "B 299 299 3"]) -> Float[Array, "B 8 8 2048"]:
        """Images in [-1, 1] → the map whose mean over positions FID calls an image's features."""
        x = images
        for layer in _STEM:
            x = getattr(self, layer.name)(x) if isinstance(layer, Conv) else _POOLS[layer](x)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x


_POOLS = {
    "halve": lambda x: nnx.max_pool(x, (3, 3), (2, 2)),
    "max": lambda x: nnx.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1))),
    "average": lambda x: nnx.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False),
}

_STEM: tuple[Conv | str, ...] = (
    Conv("conv2d_1a_3x3", 32, (3, 3), stride=2, padded=False),
    Conv("conv2d_2a_3x3", 32, (3, 3), padded=False),
    Conv("conv2d_2b_3x3", 64, (3, 3)),
    "halve",
    Conv("conv2d_3b_1x1", 80),
    Conv("conv2d_4a_3x3", 192, (3, 3), padded=False),
    "halve",
)


def _row(name: str, *sizes: tuple[int, ...], halves: bool = False, pool: str | None = None) -> Branch:
    """Convolutions in a row by (width, height and width of the kernel); the last may halve the map."""
    convs = []
    for i, (width, *kernel) in enumerate(sizes, 1):
        own = f"branch{name}_{i}" if len(sizes) > 1 else f"branch{name}"
        last = halves and i == len(sizes)
        convs.append(Conv(own, width, tuple(kernel) or (1, 1), stride=1 + last, padded=not last))
    return Branch(tuple((conv,) for conv in convs), pool)


def _block_35(pooled: int) -> tuple[Branch, ...]:
    return (
        _row("1x1", (64,)),
        _row("5x5", (48,), (64, 5, 5)),
        _row("3x3dbl", (64,), (96, 3, 3), (96, 3, 3)),
        _row("_pool", (pooled,), pool="average"),
    )


def _block_17(n: int) -> tuple[Branch, ...]:
    return (
        _row("1x1", (192,)),
        _row("7x7", (n,), (n, 1, 7), (192, 7, 1)),
        _row("7x7dbl", (n,), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)),
        _row("_pool", (192,), pool="average"),
    )


def _block_8(pool: str) -> tuple[Branch, ...]:
    def split(name: str, *sizes: tuple[int, ...]) -> Branch:
        """Convolutions in a row, then two side by side."""
        row = _row(name, *sizes, (0,)).steps[:-1]
        last = f"branch{name}_{len(sizes) + 1}"
        return Branch((*row, (Conv(f"{last}a", 384, (1, 3)), Conv(f"{last}b", 384, (3, 1)))))

    return (
        _row("1x1", (320,)),
        split("3x3", (384,)),
        split("3x3dbl", (448,), (384, 3, 3)),
        _row("_pool", (192,), pool=pool),
    )


_BLOCKS: dict[str, tuple[Branch, ...]] = {
    "mixed_5b": _block_35(32),
    "mixed_5c": _block_35(64),
    "mixed_5d": _block_35(64),
    "mixed_6a": (
        _row("3x3", (384, 3, 3), halves=True),
        _row("3x3dbl", (64,), (96, 3, 3), (96, 3, 3), halves=True),
        Branch(pool="halve"),
    ),
    "mixed_6b": _block_17(128),
    "mixed_6c": _block_17(160),
    "mixed_6d": _block_17(160),
    "mixed_6e": _block_17(192),
    "mixed_7a": (
        _row("3x3", (192,), (320, 3, 3), halves=True),
        _row("7x7x3", (192,), (192, 1, 7), (192, 7, 1), (192, 3, 3), halves=True),
        Branch(pool="halve"),
    ),
    "mixed_7b": _block_8("average"),
    "mixed_7c": _block_8("max"),
}
