"""`profile_model.py`: the efficiency columns of the paper's Tables 1 and 2, beside the paper's figures."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moebius_jax.cli.arguments import require_positive
from moebius_jax.cli.terminal import enable_compilation_cache, progress, run
from moebius_jax.defaults import DTYPES
from moebius_jax.errors import UserError
from moebius_jax.files import require_writable

if TYPE_CHECKING:
    from benchmarks.common import Row

# Of `efficiency.NETWORKS`; --help need not wait for what that imports.
NAMES = ("student", "teacher", "exp1", "exp2", "exp3", "exp4", "exp5", "exp6", "exp8")
_DESCRIPTION = """\
What the student, the teacher and every variant of Table 2 cost at 512 px, batch 1, beside the paper's
columns.
"""
_EPILOG = """\
columns:
  params          millions of trainable numbers
  GMAC            10⁹ multiply-adds with weights, one pass: what the paper calls FLOPs
  all GMAC        with products of two activations, which the paper leaves out
  GFLOP           floating-point operations: twice all GMAC
  XLA GFLOP       the compiler's own count for the program that runs
  ms/pass         one pass of the network; so we read the paper's "ms/step" (on one NVIDIA L40S)
  ms/guided step  both branches of guidance, as a batch of 2
  memory          weights + temporaries of one pass, by XLA's plan
  total, guided   20 passes, in seconds, as the paper adds it up; and 20 guided steps

examples:
  python profile_model.py --count-only                 # seconds, runs nothing
  python profile_model.py --networks student teacher --dtype bfloat16
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="profile_model.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--networks",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        metavar="NAME",
        help=f"default all: {' '.join(NAMES)}",
    )
    add("--count-only", action="store_true", help="count parameters and multiply-adds, run nothing")
    add(
        "--dtype",
        choices=DTYPES,
        help="compute dtype (default float16 on GPUs, bfloat16 on TPUs, float32 on CPUs)",
    )
    add(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="timed runs, of which the median counts (default 5)",
    )
    add("--output", dest="json", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(argv)
    return run(lambda: _profile(args))


def _profile(args: argparse.Namespace) -> int:
    require_positive(args, "repeats")
    if args.json:
        if args.json.is_dir():
            raise UserError(f"{args.json}: is a folder, expected a file to write")
        require_writable(args.json.parent)  # before the work, not after it
    import jax

    from benchmarks.common import report
    from moebius_jax.models.precision import auto_dtype

    dtype = args.dtype or jax.numpy.dtype(auto_dtype()).name
    if not args.count_only:
        enable_compilation_cache()
    rows = [_row(name, args, dtype) for name in progress(args.networks, desc="networks")]
    return report(rows, args, device=f"{jax.devices()[0].device_kind}, {dtype}; paper: NVIDIA L40S")


def _row(name: str, args: argparse.Namespace, dtype: str) -> "Row":
    """One network's figures, each beside the paper's."""
    from benchmarks.efficiency import NETWORKS, STEPS, measure, multiply_adds
    from moebius_jax.weights.tensors import count_parameters

    network = NETWORKS[name]
    counted = multiply_adds(network.config)
    row: Row = {
        "network": name,
        "Table 2": ", ".join(map(str, network.rows)),
        "params M": count_parameters(network.config) / 1e6,
        "paper": network.parameters,
        "GMAC": counted.with_weights / 1e9,
        "paper GMAC": network.gflops,
        "differs": f"{counted.with_weights / 1e9 / network.gflops - 1:+.2%}",
        "all GMAC": counted.flops / 2e9,
        "GFLOP": counted.flops / 1e9,
    }
    if args.count_only:
        return row
    found = measure(network.config, dtype=dtype, repeats=args.repeats)
    published = network.milliseconds
    return row | {
        "XLA GFLOP": found.xla_flops / 1e9 if found.xla_flops else "–",
        "ms/pass": found.pass_ms,
        "paper ms": published or "–",
        "ms/guided step": found.step_ms,
        "memory GB": (found.weights_bytes + found.temporary_bytes) / 1e9,
        "total s": STEPS * found.pass_ms / 1e3,
        "paper s": STEPS * published / 1e3 if published else "–",
        "guided s": STEPS * found.step_ms / 1e3,
    }
