"""Fetches the photographs that `tiny` is trained on, checks their hashes, and cuts squares out of them.

    python examples/tiny/photographs.py WORK

`photographs.tsv` lists them: package, file, author, licence, SHA-256, and whether a photograph is trained
on or held out. Debian's packages are downloaded by apt-get (Debian, Ubuntu; nothing is installed);
scikit-image's and scikit-learn's photographs come with those packages. Leaves WORK/train and
WORK/held_out, squares of 128 pixels, and WORK/held_out_photographs, whole.
"""

import argparse
import csv
import hashlib
import importlib.resources
import math
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from moebius_jax.imaging.picture import open_image

TABLE = Path(__file__).with_name("photographs.tsv")
SIDE = 128  # pixels of a square
SQUARES = {"train": 160, "held_out": 16}  # of each photograph


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    with TABLE.open(encoding="utf-8", newline="") as file:
        photographs = list(csv.DictReader(file, delimiter="\t"))
    for photograph in photographs:
        folder = work / photograph["split"]
        stem = f"{photograph['package'].split('-')[0]}_{_name(photograph['file'])}"
        if (folder / f"{stem}_000.png").exists():
            continue
        path = located(photograph, work / "packages")
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != photograph["sha256"]:
            sys.exit(f"{path}: SHA-256 {found}; expected {photograph['sha256']}")
        folder.mkdir(parents=True, exist_ok=True)
        if photograph["split"] == "held_out":
            whole = work / "held_out_photographs"
            whole.mkdir(exist_ok=True)
            shutil.copy(path, whole / f"{stem}{path.suffix}")
        with open_image(path) as image:
            squares = cut(image.convert("RGB"), SQUARES[photograph["split"]], zlib.crc32(stem.encode()))
        for k in reversed(range(len(squares))):  # number 0 last: it says that all are there
            squares[k].save(folder / f"{stem}_{k:03d}.png")
        print(f"{folder / stem}: {len(squares)} squares", flush=True)
    return 0


def located(photograph: dict[str, str], packages: Path) -> Path:
    """The file of a photograph; its package is fetched and unpacked where that has not been done."""
    package, file = photograph["package"], photograph["file"]
    if package.startswith(("skimage", "sklearn")):
        return Path(str(importlib.resources.files(package) / file))
    folder = packages / package
    if not folder.exists():
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "--quiet", package], cwd=packages, check=True)
        (archive,) = packages.glob(f"{package}_*.deb")
        partial = packages / f"{package}.partial"
        subprocess.run(["dpkg-deb", "--extract", archive, partial], check=True)
        partial.rename(folder)
    return folder / file


def cut(image: Image.Image, count: int, seed: int) -> list[Image.Image]:
    """Random squares, their sides spread evenly over all scales from SIDE up to the whole picture."""
    rng = np.random.default_rng(seed)
    short = min(image.size)
    squares = []
    for _ in range(count):
        side = round(math.exp(rng.uniform(math.log(min(SIDE, short)), math.log(short))))
        x, y = (int(rng.integers(n - side + 1)) for n in image.size)
        square = image.crop((x, y, x + side, y + side))
        squares.append(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return squares


def _name(file: str) -> str:
    """The telling part of a path: Plasma's files are named by their sizes."""
    path = Path(file)
    return path.parents[2].name if path.parent.name == "images" else path.stem


if __name__ == "__main__":
    sys.exit(main())
