"""Inpaints an image or a folder of images; see --help."""

import sys

from moebius_jax.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
