"""Which of several forms of one computation a platform runs. They differ in rounding only.

Every choice was counted or timed: benchmarks/RESULTS.md. `platform` is "cpu", "gpu" or "tpu"; None is the
running one.
"""

import jax

from moebius_jax.models.parts import PositionOrder


def position_order(width: int, platform: str | None) -> PositionOrder:
    """Order of Local-λ's position term on a map `width` positions wide."""
    # Small maps: the band is smaller than λp. On an H200 and on CPUs the two cross between 32 and 64
    # positions a side. On TPUs memory traffic decides: by the compiler's count they cross between 16 and 32.
    return "toeplitz" if width > (16 if _or_running(platform) == "tpu" else 32) else "banded"


def sums_over_depth(platform: str | None) -> bool:
    """Whether Interactive-λ's scores are sums of elementwise products rather than matrix products."""
    # Ten tokens fill no matrix unit's tile: on a GPU one fused kernel replaces four. TPUs lose fourfold.
    return _or_running(platform) == "gpu"


def upsampling_in_phases(platform: str | None) -> bool:
    """Whether a doubled map's 3x3 convolution is done as four 2x2 convolutions of the map itself."""
    # 4/9 of the multiplications; on TPUs interleaving the results costs more than that.
    return _or_running(platform) == "gpu"


def _or_running(platform: str | None) -> str:
    return platform or jax.default_backend()
