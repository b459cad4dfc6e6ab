"""Exports a model for other runtimes; see --help."""

import sys

from moebius_jax.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
