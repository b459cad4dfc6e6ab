"""Converts released PyTorch weights to moebius-jax folders and back; see --help."""

import sys

from moebius_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
