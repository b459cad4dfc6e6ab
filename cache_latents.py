#!/usr/bin/env python3
"""Encode training images once: see `python cache_latents.py --help`."""

import sys

from moebius_jax.cli.cache_latents import main

if __name__ == "__main__":
    sys.exit(main())
