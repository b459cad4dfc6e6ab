"""The mean of two trained models' weights: nearer to the middle of what fits than either of them.

python examples/tiny/average.py WORK/sharpened/model WORK/one_step/model WORK/mean
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

from moebius_jax.cli.terminal import run
from moebius_jax.inpaint.model_folder import UNET, VAE, find_model, write_model_folder
from moebius_jax.weights.folder import load_numpy, read_config, save


def main() -> int:
    return run(average)


def average() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs=2, help="what train.py left, of one architecture")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    first, second = map(find_model, args.models)
    weights = [load_numpy(model.unet) for model in (first, second)]
    mean = {key: np.mean([w[key] for w in weights], axis=0, dtype=np.float32) for key in weights[0]}
    with write_model_folder(args.folder, sampling=second.sampling, overwrite=False) as partial:
        save(partial / UNET, read_config(second.unet).architecture, mean, dtype="float32", source={})
        shutil.copytree(second.vae, partial / VAE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
