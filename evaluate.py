"""Paint a benchmark's images and score them, or score any method's pictures: python evaluate.py --help."""

import sys

from moebius_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
