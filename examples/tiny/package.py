"""Makes of a trained model one to give away: in half precision, without the paths of where it was trained.

    python examples/tiny/package.py WORK/mean WORK/tiny

The package's own is such a folder, `moebius_jax/tiny`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from moebius_jax.inpaint.model_folder import UNET, VAE, find_model, write_model_folder
from moebius_jax.weights.folder import load_numpy, read_config, save
from moebius_jax.weights.tensors import statistics_of

LICENSE = "gpl-3.0"  # as the Hub names it; or later: docs/tiny.md
SOURCE = {"trained_by": "examples/train_tiny.sh", "card": "docs/tiny.md", "license": "GPL-3.0-or-later"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="what train.py left")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    found = find_model(args.model)
    with write_model_folder(args.folder, sampling=found.sampling, overwrite=True, license=LICENSE) as partial:
        for name, part in ((UNET, found.unet), (VAE, found.vae)):
            config = read_config(part)
            statistics = statistics_of(config.architecture)
            tensors = {
                key: value if key in statistics else value.astype(np.float16)
                for key, value in load_numpy(part).items()
            }
            source = SOURCE | ({"step": config.source["step"]} if "step" in config.source else {})
            save(partial / name, config.architecture, tensors, dtype="float16", source=source)
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(f"{args.folder}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
