"""`export.py`: a model for other runtimes."""

import argparse
import sys

from moebius_jax.cli.arguments import (
    REVISION,
    add_extension_argument,
    add_no_verify,
    any_location,
    local_path,
    require_positive,
)
from moebius_jax.cli.terminal import require_extra, run
from moebius_jax.defaults import DTYPES, TINY

_DESCRIPTION = """\
Writes a model's encoder, denoising step and decoder for other runtimes, with a manifest.json of sizes, shapes
and the solvers' tables, and compares each program's outputs with the model's.

    python export.py tiny exported/ --format onnx              # onnxruntime, the browser
    python export.py converted/ft_places2 exported/            # StableHLO: jax without this package

How to call the programs: docs/export.md.
"""
_EXTRAS = {"onnx": ("jax2onnx", "onnx", "onnxruntime"), "stablehlo": ()}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="export.py", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help=f"converted folder, Hub repository, or {TINY}")
    add("folder", type=local_path, help="to write")
    add("--format", choices=tuple(_EXTRAS), default="stablehlo", help="default stablehlo")
    add("--variant", help="of the released weights: pretrained (default), ft_places2, …")
    add("--revision", help=REVISION)
    add(
        "--vae", type=any_location, help="folder of a converted VAE (default: beside the model, or the Hub's)"
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="the programs compute in (default float32; ONNX: nothing else)",
    )
    add(
        "--half-weights",
        action="store_true",
        help="ONNX: keep weights in float16, half the size; computed with in float32 all the same",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="items of a call (default: any number; with --format onnx one)",
    )
    add(
        "--no-guidance",
        action="store_true",
        help="a step of one branch, half the work, for a scale of 1 (as of a model whose own is 1)",
    )
    add_extension_argument(parser)
    add_no_verify(parser)
    add("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    return run(lambda: _export(args))


def _export(args: argparse.Namespace) -> int:
    from moebius_jax.errors import UserError
    from moebius_jax.export.write import ExportOptions, export_model
    from moebius_jax.inpaint.pipeline import MoebiusInpaintPipeline

    require_positive(args, "batch_size", most=1024)
    require_extra("export", *_EXTRAS[args.format])
    if args.folder.exists() and not args.overwrite:
        raise UserError(f"{args.folder}: exists already; --overwrite replaces an earlier export")
    options = ExportOptions(
        format=args.format,
        batch=args.batch_size,
        guided=False if args.no_guidance else None,
        half_weights=args.half_weights,
    )
    pipeline = MoebiusInpaintPipeline.from_pretrained(
        args.model,
        variant=args.variant,
        revision=args.revision,
        vae=args.vae,
        dtype=args.dtype,
        vae_dtype=args.dtype,
        verify=not args.no_verify,
    )
    differences = export_model(
        pipeline,
        args.folder,
        options,
        overwrite=args.overwrite,
        say=lambda line: print(line, file=sys.stderr),
    )
    for found in differences:
        print(f"{found.program}: {found.output} differs by {found.relative:.1e} of its largest value")
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{args.folder}: {size / 1e6:.1f} MB")
    return 0
