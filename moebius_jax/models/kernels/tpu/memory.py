"""How much of a TPU's vector memory a kernel may ask for."""

import math
from collections.abc import Sequence

import numpy as np
from flax.typing import Dtype
from jax.experimental.pallas import tpu as pltpu

DEFAULT = 16 << 20  # bytes that the compiler grants unasked, on every generation
MOST = 64 << 20  # of 128 MiB on v5e and v6e
SPARE = 4 << 20  # what is worked on

SUBLANES, LANES = 8, 128  # of a register in fp32; in bfloat16 it has twice as many sublanes
TILE = 2 * SUBLANES, LANES  # rows and columns that the last two axes of a block are rounded up to


def block_bytes(shape: Sequence[int], dtype: Dtype) -> int:
    """Of a block, twice: the next one is fetched while one is worked on."""
    *lead, rows, columns = shape
    padded = (-(-n // unit) * unit for n, unit in zip((rows, columns), TILE, strict=True))
    return 2 * math.prod((*lead, *padded)) * np.dtype(dtype).itemsize


def compiler_params(blocks: int, **options: object) -> pltpu.CompilerParams:
    """Room for `blocks` bytes of blocks.

    Args:
        blocks: sum of `block_bytes` of all inputs and outputs.
        options: further fields of `CompilerParams`.
    """
    limit = blocks + SPARE
    return pltpu.CompilerParams(vmem_limit_bytes=limit if limit > DEFAULT else None, **options)
