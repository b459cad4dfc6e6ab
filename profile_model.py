"""What the networks cost: parameters, multiply-adds, time and memory. See --help."""

import sys

from moebius_jax.cli.profile import main

if __name__ == "__main__":
    sys.exit(main())
