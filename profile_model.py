#!/usr/bin/env python3
"""What the networks cost beside the paper's tables: see `python profile_model.py --help`."""

import sys

from benchmarks.profile import main

if __name__ == "__main__":
    sys.exit(main())
