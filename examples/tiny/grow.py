"""A U-Net for maps twice the side: only position tables know the size, and each of their rows serves four.

    python examples/tiny/grow.py WORK/small/model/unet WORK/grown

Also puts right what may happen to depthwise kernels that are drawn at random: where a corner of an input
channel's kernel is the largest weight to begin with, training can keep that channel a position aside
throughout, and move it back at the end. The row and the column that leave the map on the way are then
predicted by nobody, and show as noise along two edges. Here such weights and the centre change places, at
both ends.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from moebius_jax.weights.folder import load_numpy, read_config, save
from moebius_jax.weights.tensors import abstract_tensors

TABLE = "position_table"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("unet", type=Path)
    parser.add_argument("grown", type=Path)
    args = parser.parse_args()
    config = read_config(args.unet)
    larger = config.architecture.replace(latent_size=2 * config.architecture.latent_size)
    tensors = {
        name: doubled(value) if name.endswith(TABLE) else np.array(value)
        for name, value in load_numpy(args.unet).items()
    }
    centre(tensors["conv_in.depthwise.kernel"], tensors["conv_out.depthwise.kernel"])
    wrong = [n for n, a in abstract_tensors(larger).items() if a.shape != tensors[n].shape]
    if wrong:
        sys.exit(f"{args.unet}: {wrong[0]} depends on the size in another way than position tables do")
    save(args.grown, larger, tensors, dtype=config.dtype, source=config.source)
    return 0


def centre(first: np.ndarray, last: np.ndarray) -> None:
    """Undoes, in place, shifts between the first and the last depthwise kernels, [3, 3, channels] each."""
    shifts = set()
    for channel in range(first.shape[-1]):
        shifts |= {moved} if (moved := _exchange(first[..., channel])) else set()
    back = {(2 - y, 2 - x) for y, x in shifts}
    for channel in range(last.shape[-1]):
        _exchange(last[..., channel], only=back)
    print(f"shifts undone: {sorted((y - 1, x - 1) for y, x in shifts)}")


def _exchange(kernel: np.ndarray, only: set[tuple[int, int]] | None = None) -> tuple[int, int] | None:
    """Exchanges a kernel's largest weight with its centre; where it was, if it was elsewhere."""
    y, x = map(int, np.unravel_index(np.abs(kernel).argmax(), kernel.shape))
    if (y, x) == (1, 1) or (only is not None and (y, x) not in only):
        return None
    kernel[y, x], kernel[1, 1] = kernel[1, 1], kernel[y, x]
    return y, x


def doubled(table: np.ndarray) -> np.ndarray:
    """[n², L, k] → [(2n)², L, k]."""
    side = int(np.sqrt(len(table)))
    grid = table.reshape(side, side, *table.shape[1:])
    return grid.repeat(2, 0).repeat(2, 1).reshape(-1, *table.shape[1:])


if __name__ == "__main__":
    sys.exit(main())
