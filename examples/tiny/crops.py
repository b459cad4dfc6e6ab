"""Cuts cached latents into smaller maps, for a first stage of training on cheaper samples.

python examples/tiny/crops.py WORK/latents_train WORK/crops_train
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

from moebius_jax.data.latent_cache import CacheWriter, LatentCache
from moebius_jax.data.samples import LatentSample
from moebius_jax.files import replace_when_complete

SIDE, PER_SAMPLE = 16, 3
LEAST, MOST = (
    0.04,
    0.75,
)  # of a crop that is hole: one needs a hole to learn from, and a rim


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("crops", type=Path)
    args = parser.parse_args()
    cache = LatentCache(args.source)
    crops = [crop for i in range(len(cache)) for crop in cut(cache[i], np.random.default_rng(i))]
    made_of = {**cache.info.made_of, "crops_of_side": SIDE}
    info = dataclasses.replace(cache.info, samples=len(crops), side=SIDE, made_of=made_of)
    with replace_when_complete(args.crops, overwrite=False) as partial:
        partial.mkdir()
        writer = CacheWriter(partial, info, crops[0])
        for crop in crops:
            writer.add(LatentSample(*(np.asarray(leaf)[None] for leaf in crop)))
        writer.close()
    print(f"{args.crops}: {len(crops)} crops of {len(cache)} samples")
    return 0


def cut(sample: LatentSample, rng: np.random.Generator) -> list[LatentSample]:
    crops = []
    for _ in range(PER_SAMPLE):
        y, x = rng.integers(sample.hole.shape[0] - SIDE + 1, size=2)
        part = [leaf[y : y + SIDE, x : x + SIDE] for leaf in sample[:3]]
        if LEAST <= part[2].mean() <= MOST:
            crops.append(LatentSample(*part, task=sample.task))
    return crops


if __name__ == "__main__":
    sys.exit(main())
