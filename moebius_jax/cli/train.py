"""`moebius-train`: runs `train.py`, where it is: in the package that is installed, or in the checkout."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from moebius_jax.cli.arguments import any_location, local_path


def main() -> None:
    """Entry point; ends the program."""
    package = Path(__file__).parents[1]
    story = next(p for p in (package / "train.py", package.parent / "train.py") if p.is_file())
    sys.argv[0] = str(story)
    runpy.run_path(str(story), run_name="__main__")


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """`train.py`'s arguments, from `sys.argv` where `argv` is None; ends the program where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="a file of configs/, or one of your own; FILE:ARGUMENT for those that take one")
    add("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="fields to change, e.g. batch_size=32")
    add("--workdir", type=any_location, help="for all the run writes; gs://… too (default: runs/CONFIG)")
    add("--dataset", metavar="KIND", help="short for data.kind=: images, latents, synthetic")
    add("--preview-data", type=local_path, metavar="PNG", help="draw what the network will see, and stop")
    add(
        "--no-verify",
        action="store_true",
        help="short for verify=false: do not look at checksums",
    )
    add("--aot", metavar="TOPOLOGY", help="compile for a TPU slice (v5e:4x8), report, and stop")
    add("--print-config", action="store_true", help="show every field, and stop")
    add("--profile", type=int, metavar="STEP", help="trace five steps from STEP on (TensorBoard)")
    add("--distributed", action="store_true", help="join the cluster this process was started in")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, where no cluster is found")
    add("--num-processes", type=int)
    add("--process-id", type=int)
    add("--no-compilation-cache", action="store_true")
    return parser.parse_intermixed_args(argv)  # options may stand between KEY=VALUEs
