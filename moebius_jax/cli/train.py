"""`moebius-train`: runs `train.py`, where it is: in the package that is installed, or in the checkout."""

import runpy
import sys
from pathlib import Path


def main() -> int:
    """Entry point; returns the exit status."""
    package = Path(__file__).parents[1]
    story = next(p for p in (package / "train.py", package.parent / "train.py") if p.is_file())
    sys.argv[0] = str(story)
    return runpy.run_path(str(story))["main"]()
