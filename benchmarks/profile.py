"""`profile_model.py`: the efficiency columns of the paper's Tables 1 and 2, beside the paper's figures."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from moebius_jax.cli.arguments import require_positive
from moebius_jax.cli.terminal import enable_compilation_cache, progress, run
from moebius_jax.errors import UserError
from moebius_jax.files import require_writable

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
  total           20 passes, in seconds, as the paper adds it up; and 20 guided steps

examples:
  python profile_model.py --count-only                 # seconds, runs nothing
  python profile_model.py --networks student teacher --dtype bfloat16
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    from benchmarks.efficiency import NETWORKS

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
        choices=list(NETWORKS),
        default=list(NETWORKS),
        metavar="NAME",
        help=f"default all: {' '.join(NETWORKS)}",
    )
    add("--count-only", action="store_true", help="count parameters and multiply-adds, run nothing")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="compute dtype (default bfloat16 on GPU and TPU, else float32)",
    )
    add(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="timed runs, of which the median counts (default 5)",
    )
    add("--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(argv)
    return run(lambda: _profile(args))


def _profile(args: argparse.Namespace) -> int:
    import jax

    from moebius_jax import checkpoints
    from moebius_jax.evaluation import efficiency
    from moebius_jax.evaluation.published import COSTS

    require_positive(args, "repeats")
    if args.output:
        if args.output.is_dir():
            raise UserError(f"{args.output}: is a folder, expected a file to write")
        require_writable(args.output.parent)  # before the work, not after it
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if not args.count_only:
        enable_compilation_cache()
    rows = []
    for name in progress(args.networks, desc="networks"):
        config = efficiency.NETWORKS[name]
        counted = efficiency.multiply_adds(config)
        measured = None if args.count_only else efficiency.measure(config, dtype=dtype, repeats=args.repeats)
        rows.append(
            {
                "network": name,
                "table_2_rows": efficiency.TABLE_2_ROWS.get(name),
                "parameters": checkpoints.count_parameters(config),
                "multiply_adds": {**dataclasses.asdict(counted), "with_weights": counted.with_weights},
                "flops": counted.flops,
                "measured": measured and dataclasses.asdict(measured),
                "published": dataclasses.asdict(COSTS[name]),
            }
        )
    print(_table(rows, measured=not args.count_only))
    if not args.count_only:
        print(f"\n{jax.devices()[0].device_kind}, {dtype}, jax {jax.__version__}; paper: NVIDIA L40S")
    if args.output:
        _write(args.output, {"device": jax.devices()[0].device_kind, "dtype": dtype, "networks": rows})
    return 0


def _table(rows: list[dict[str, Any]], *, measured: bool) -> str:
    from moebius_jax.evaluation.published import STEPS
    from moebius_jax.evaluation.report.markdown import table

    head = ["network", "Table 2", "params M", "paper", "GMAC", "paper", "differs", "all GMAC", "GFLOP"]
    if measured:
        head += ["XLA GFLOP", "ms/pass", "paper", "ms/guided step", "memory GB", "total s", "paper", "guided"]
    lines = []
    for row in rows:
        macs, paper = row["multiply_adds"], row["published"]
        counted = macs["with_weights"] / 1e9
        line = [
            row["network"],
            row["table_2_rows"] or "",
            f"{row['parameters'] / 1e6:.1f}",
            f"{paper['parameters']:g}",
            f"{counted:.2f}",
            f"{paper['gflops']:g}",
            f"{counted / paper['gflops'] - 1:+.2%}",
            f"{row['flops'] / 2e9:.2f}",
            f"{row['flops'] / 1e9:.1f}",
        ]
        if measured:
            line += _measured_cells(row["measured"], paper["milliseconds"], STEPS)
        lines.append(line)
    return table(head, lines)


def _measured_cells(found: dict[str, Any], paper_ms: float | None, steps: int) -> list[str]:
    memory = (found["weights_bytes"] + found["temporary_bytes"]) / 1e9
    return [
        f"{found['xla_flops'] / 1e9:.1f}" if found["xla_flops"] else "–",
        f"{found['pass_ms']:.2f}",
        f"{paper_ms:g}" if paper_ms else "–",
        f"{found['step_ms']:.2f}",
        f"{memory:.2f}",
        f"{steps * found['pass_ms'] / 1e3:.2f}",
        f"{steps * paper_ms / 1e3:.2f}" if paper_ms else "–",
        f"{steps * found['step_ms'] / 1e3:.2f}",
    ]


def _write(file: Path, values: dict[str, Any]) -> None:
    from moebius_jax.files import replace_when_complete

    with replace_when_complete(file, overwrite=True) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
