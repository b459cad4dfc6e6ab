"""A U-Net for maps twice the side: only position tables know the size, and each of their rows serves four.

python examples/tiny/grow.py WORK/small/model/unet WORK/grown
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
        name: doubled(value) if name.endswith(TABLE) else value
        for name, value in load_numpy(args.unet).items()
    }
    wrong = [n for n, a in abstract_tensors(larger).items() if a.shape != tensors[n].shape]
    if wrong:
        sys.exit(f"{args.unet}: {wrong[0]} depends on the size in another way than position tables do")
    save(args.grown, larger, tensors, dtype=config.dtype, source=config.source)
    return 0


def doubled(table: np.ndarray) -> np.ndarray:
    """[n², L, k] → [(2n)², L, k]."""
    side = int(np.sqrt(len(table)))
    grid = table.reshape(side, side, *table.shape[1:])
    return grid.repeat(2, 0).repeat(2, 1).reshape(-1, *table.shape[1:])


if __name__ == "__main__":
    sys.exit(main())
