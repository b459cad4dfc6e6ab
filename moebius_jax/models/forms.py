"""Which of several forms of one computation a platform runs. They differ in rounding only.

Every choice was counted or timed: benchmarks/RESULTS.md. `platform` is "cpu", "gpu", "tpu" or "tpu-v4", which
stands for those before v5; "portable" takes the plain forms, none of them chosen for one platform's compiler,
for programs that may run anywhere; None is the running one.

MOEBIUS_KERNELS=off in the environment, before a network is prepared and traced, takes XLA's forms wherever
they are chosen here: to tell whether something is a kernel's doing, and where one does not compile.
"""

import functools
import os
from typing import Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax

from moebius_jax.errors import UserError
from moebius_jax.models import winograd
from moebius_jax.models.kernels.common import power_of_two
from moebius_jax.models.kernels.tpu import depthwise, interactive_lambda, local_lambda
from moebius_jax.models.mixers.position_term import TILE
from moebius_jax.models.parts import PositionOrder

SWITCH = "MOEBIUS_KERNELS"  # in the environment
OLD_TPUS = ("TPU v2", "TPU v3", "TPU v4")  # cannot roll lanes by a stride


def platform_of(device: jax.Device) -> str:
    """What these functions call the platform of a device."""
    return "tpu-v4" if device.device_kind.startswith(OLD_TPUS) else device.platform


def kernels_interpreted(platform: str | None) -> bool:
    """Whether our kernels are interpreted, for tests: this is not a platform they are written for."""
    return _or_running(platform) not in ("gpu", "tpu")


def tpu_kernels(platform: str | None) -> bool:
    """Whether a computation with a kernel for GPUs and one for TPUs takes the latter.

    Raises:
        ValueError: it is a TPU without.
    """
    is_tpu = _or_running(platform) == "tpu"
    if is_tpu and not _is_recent_tpu(platform):
        raise ValueError("kernels need a TPU of v5 or later; leave position_order on auto")
    return is_tpu


def position_order(
    shape: tuple[int, int], heads: int, depth: int, window: int, dtype: Dtype, platform: str | None
) -> PositionOrder:
    """Order of Local-λ's position term, on a map of `shape` (H, W)."""
    # One kernel with the content term; a GPU's needs a power of two of heads, a TPU's has the whole map's
    # values at hand.
    if _has_kernels(dtype, platform) and power_of_two(heads) == heads:
        return "fused"
    if _has_tpu_kernels(dtype, platform) and local_lambda.fits(*shape, heads, depth, window):
        return "fused"
    return _unfused_position_order(shape[1], heads, depth, window, platform)


def _unfused_position_order(
    width: int, heads: int, depth: int, window: int, platform: str | None
) -> PositionOrder:
    """The best of XLA's: λp or q·w, on the window's rows or on what a tile sees."""
    row, tile = window * width, (window + TILE - 1) ** 2
    if _or_running(platform) != "cpu":
        # The one with less in memory for each position. The released student's two cross between 32 and 64
        # positions a side on an H200, and between 16 and 32 on TPUs, by the compiler's count.
        banded = heads * row * (2 if _or_running(platform) == "tpu" else 1)
        return "banded" if banded < depth**2 else "toeplitz"
    # A number of λp or q·w, written and read again, takes as long as so many multiply-adds.
    number = 300
    if depth**2 * (row + number) < heads * min(row, tile) * (2 * depth + number):
        return "toeplitz"
    return "banded" if row < tile else "tiles"


def thin_products(platform: str | None) -> lax.Precision | lax.DotAlgorithmPreset:
    """How fp32 operands beside a half-precision bulk are multiplied."""
    # Of HIGH, a TPU makes three passes in bfloat16; a GPU tensor-float-32 or plain fp32, by autotuning.
    if _is_recent_gpu(platform) and not kernels_interpreted(platform):
        return lax.DotAlgorithmPreset.TF32_TF32_F32
    return lax.Precision.HIGH


def float32_products(platform: str | None) -> str | None:
    """`jax_default_matmul_precision` for a U-Net in fp32 throughout: what the user set, or what it takes."""
    # A TPU would round all operands to bfloat16: 2.7 % in the predicted noise, more than a bfloat16 network
    # with an fp32 stream. Three passes leave 5e-5. A GPU's tensor-float-32, 0.4 % off, is left as it is.
    chosen = jax.config.jax_default_matmul_precision
    return "high" if chosen is None and _or_running(platform).startswith("tpu") else chosen


def fused_products(dtype: Dtype, platform: str | None) -> bool:
    """Whether products over the channels take bias, activation and sum into their kernel at inference."""
    # XLA's own fuse a whole map that is there already, but neither a bias nor a sum just computed.
    return _has_kernels(dtype, platform)


def fused_group_norm(dtype: Dtype, platform: str | None) -> bool:
    """Whether GroupNorm is two kernels of ours at inference rather than four or five of XLA's."""
    return _has_kernels(dtype, platform)


def channels_averaged_first(platform: str | None) -> bool:
    """Whether GroupNorm's averages are of channels first, then of groups."""
    # Cut into groups, a map's rows of eight channels are too short for a CPU's vectors. A TPU takes longer.
    return _or_running(platform) == "cpu"


def softmax_divided_last(platform: str | None) -> bool:
    """Whether a softmax over many positions is divided by its sum after the product with the values."""
    # Otherwise XLA makes one loop of both products on a CPU, which takes three times as long as they do. A
    # GPU reads the weights once more.
    return _or_running(platform) == "cpu"


def one_pass_rows(platform: str | None) -> bool:
    """Whether LayerNorm of a half-precision map takes its two sums in one pass."""
    # A GPU keeps a row in registers between two passes, in one kernel; a TPU's compiler makes two of it.
    return _or_running(platform) == "tpu"


def fused_interactive_lambda(dtype: Dtype, positions: int, heads: int, platform: str | None) -> bool:
    """Whether Interactive-λ is one kernel at inference rather than four matrix products with ten tokens."""
    if _has_tpu_kernels(dtype, platform):
        return interactive_lambda.fits(positions, heads)
    return _has_kernels(dtype, platform) and power_of_two(heads) == heads


def fused_gated_linear_attention(dtype: Dtype, platform: str | None) -> bool:
    """Whether GLA's recurrence is two kernels of ours rather than the thirty of a scan of XLA's."""
    return _has_kernels(dtype, platform)


def depthwise_kernel(shape: tuple[int, ...], stream_dtype: Dtype, dtype: Dtype, platform: str | None) -> bool:
    """Whether a depthwise convolution of a map [B, H, W, C], and its gradients, are kernels.

    `stream_dtype` is the map's, `dtype` the result's.
    """
    # By the compiler's schedule a quarter of the time that nine shifted multiply-adds take in XLA's hands.
    is_read = jnp.dtype(stream_dtype) in (jnp.bfloat16, jnp.float32)
    return is_read and _has_tpu_kernels(dtype, platform) and depthwise.fits(shape, stream_dtype)


DepthwiseGradient = Literal["autodiff", "scan", "kernel", "convolution"]


def depthwise_gradient(dtype: Dtype, platform: str | None) -> DepthwiseGradient:
    """Form of the gradient of a depthwise convolution's weights, which autodiff makes nine reductions of."""
    # Item by item the map stays in the cache: 0.3 to 0.5 of the nine reductions' time.
    if _or_running(platform) == "cpu":
        return "scan"
    if _has_kernels(dtype, platform):
        return "kernel"
    # 0.17 of the nine reductions' time at eight items a device, 0.3 at twelve. The convolution itself is
    # faster as XLA's own too at eight (0.6), but not at twelve (0.9) and four (2.5), and nothing here knows
    # how many items a device has.
    if _or_running(platform) == "tpu" and jnp.dtype(dtype).itemsize == 2:
        return "convolution"
    return "autodiff"


def upsampling_in_phases(dtype: Dtype, platform: str | None, *, has_gradient: bool) -> bool:
    """Whether a doubled map's 3x3 convolution is done as four 2x2 convolutions of the map itself."""
    # 4/9 of the multiplications. On a TPU XLA takes longer than that to interleave the results; our kernel
    # does not, but has no gradient.
    if _or_running(platform) != "tpu":
        return True
    return not has_gradient and _has_tpu_kernels(dtype, platform)


def fewer_multiplications(
    shape: tuple[int, ...], kernel: tuple[int, ...], dtype: Dtype, platform: str | None
) -> bool:
    """Whether a convolution at stride 1 of a map [B, H, W, C] with a kernel [r, r, C, D] is `winograd`'s."""
    if _or_running(platform) != "cpu" or jnp.dtype(dtype) != jnp.float32:
        return False
    (_, height, width, _), (side, _, channels, outputs) = shape, kernel
    tile, points = winograd.sizes(side)
    saved = (side**2 - (points / tile) ** 2) * channels * outputs
    numbers = (points / tile) ** 2 * (channels + outputs) + points**2 * channels * outputs / (height * width)
    # A number of the transformed map, result or kernel, written and read again, takes as long as 150
    # multiply-adds: measured from 16 to 512 positions a side, 64 to 1280 channels. And such a layer takes a
    # tenth of a second to compile: it must save a fiftieth in each picture.
    return height * width * (saved - 150 * numbers) > 2e9


def spare_positions(side: int, platform: str | None) -> int:
    """By how many positions an output of `side` rows or columns is lengthened, to be cut off again."""
    # On AVX2, Eigen takes four positions at a time, across items, and rounds differently where fewer are
    # left: with an odd number of positions an item, results would depend on the place in the batch.
    return side % 2 if _or_running(platform) in ("cpu", "portable") else 0


def _has_kernels(dtype: Dtype, platform: str | None) -> bool:
    """Our kernels are for half precision: they would multiply fp32 in fewer bits than asked for."""
    return _kernels_wanted() and jnp.dtype(dtype).itemsize == 2 and _is_recent_gpu(platform)


def _has_tpu_kernels(dtype: Dtype, platform: str | None) -> bool:
    """They are for bfloat16: a TPU loads no float16, and would multiply fp32 in fewer bits than asked for."""
    return _kernels_wanted() and jnp.dtype(dtype) == jnp.bfloat16 and _is_recent_tpu(platform)


def _kernels_wanted() -> bool:
    setting = os.environ.get(SWITCH, "on")
    if setting not in ("on", "off"):
        raise UserError(f"{SWITCH}={setting}: expected on or off")
    return setting == "on"


def _is_recent_tpu(platform: str | None) -> bool:
    return (platform or platform_of(jax.local_devices()[0])) == "tpu"


def _is_recent_gpu(platform: str | None) -> bool:
    return _or_running(platform) == "gpu" and (platform is not None or _runs_ampere())


@functools.cache
def _runs_ampere() -> bool:
    """Whether it is an NVIDIA GPU of compute capability 8 or above, which Triton and TF32 want."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]
    return major.isdecimal() and int(major) >= 8


def _or_running(platform: str | None) -> str:
    return (platform or jax.default_backend()).removesuffix("-v4")
