"""`python -m moebius_jax.masks`: draws a set of masks into a folder."""

import sys

from moebius_jax.cli.masks import main

if __name__ == "__main__":
    sys.exit(main())
