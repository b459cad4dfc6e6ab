"""Writes a real photograph that scikit-image ships, and a mask over part of it."""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw
from skimage import data

HOLE = (0.53, 0.56, 0.67, 0.86)  # the spoon: left, top, right, bottom of an ellipse, as shares of the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo", type=Path)
    parser.add_argument("mask", type=Path)
    args = parser.parse_args()
    photo = Image.fromarray(data.coffee())
    mask = Image.new("L", photo.size)
    left, top, right, bottom = HOLE
    W, H = photo.size
    ImageDraw.Draw(mask).ellipse((left * W, top * H, right * W, bottom * H), fill=255)
    for path, image in ((args.photo, photo), (args.mask, mask)):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


if __name__ == "__main__":
    main()
