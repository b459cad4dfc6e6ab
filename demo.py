"""Serves a page to paint on; see --help."""

import sys

from moebius_jax.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
