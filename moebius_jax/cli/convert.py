"""`convert_weights.py`: released PyTorch files to folders of ours, and back."""

import argparse
import sys
from pathlib import Path

from moebius_jax.cli.arguments import add_extension_argument, local_path
from moebius_jax.cli.terminal import progress, run
from moebius_jax.defaults import DTYPES

_DESCRIPTION = """\
Convert released weights (Moebius, PixelHacker, the ablations, the VAE, E-LatentLPIPS, FID's Inception) to a
folder for moebius-jax.

What the file is, and every size of it, is read off its tensors. Each tensor must fit exactly; otherwise
nothing is written and every difference is listed: - missing, + unknown, ~ of another shape, ! duplicate.
"""

_EXAMPLES = """\
examples:
  python convert_weights.py ft_places2/diffusion_pytorch_model.bin converted/ft_places2
  python convert_weights.py Moebius/ converted/            # a folder in the Hub's layout, all variants
  python convert_weights.py model_EMA.bin converted/ema --base diffusion_pytorch_model.bin
  python convert_weights.py converted/ft_places2 --export back.safetensors
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="convert_weights.py",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=local_path, help=".bin, .pth or .safetensors file, or a folder of the Hub's layout"
    )
    parser.add_argument(
        "dest", type=local_path, nargs="?", help="folder to make: config.json and an Orbax checkpoint"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the stored parameters (default float32; BatchNorm statistics always are)",
    )
    parser.add_argument(
        "--base",
        type=local_path,
        metavar="CHECKPOINT",
        help="supplies the BatchNorm statistics an EMA file lacks",
    )
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="convert NaN and infinite weights, and negative variances, which are refused otherwise",
    )
    parser.add_argument("--verify", action="store_true", help="read DEST again and compare every tensor")
    parser.add_argument(
        "--export",
        type=local_path,
        metavar="FILE",
        help="write SOURCE, a converted folder, as the release's .safetensors or (with torch) .bin",
    )
    add_extension_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace DEST if it exists")
    args = parser.parse_args(argv)
    if (args.dest is None) == (args.export is None):
        parser.error("give either DEST to convert, or --export FILE to go the other way")
    if args.export and (args.verify or args.base or args.dtype != "float32"):
        parser.error("--export writes what is stored; --dtype, --base and --verify are for converting")
    return run(lambda: _export(args) if args.export else _convert(args))


def _export(args: argparse.Namespace) -> int:
    from moebius_jax.weights.convert import export_file

    count = export_file(args.source, args.export, overwrite=args.overwrite)
    print(f"{args.export}: {count} tensors")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from moebius_jax.weights.convert import convert_file, is_converted
    from moebius_jax.weights.hub import find_weights
    from moebius_jax.weights.tensors import count_parameters

    files = find_weights(args.source) if args.source.is_dir() else {"": args.source}
    for name, file in files.items():
        dest = args.dest / name
        if args.source.is_dir() and not args.overwrite and is_converted(file, dest, dtype=args.dtype):
            print(f"{dest}: converted already from this file, kept")
            if args.verify:
                _verify(file, dest, args.base)
            continue
        architecture = convert_file(
            file,
            dest,
            dtype=args.dtype,
            base=args.base,
            overwrite=args.overwrite,
            allow_nonfinite=args.allow_nonfinite,
            track=progress,
        )
        print(f"{dest}: {architecture.describe()}, {count_parameters(architecture):,} parameters")
        if args.verify:
            _verify(file, dest, args.base)
    return 0


def _verify(file: Path, dest: Path, base: Path | None) -> None:
    from moebius_jax.weights.convert import verify_folder

    print(f"{dest}: {verify_folder(file, dest, base=base, track=progress)} tensors verified")


if __name__ == "__main__":
    sys.exit(main())
