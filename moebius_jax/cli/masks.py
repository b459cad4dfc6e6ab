"""`python -m moebius_jax.masks`: a set of random masks in a folder."""

import argparse

from moebius_jax.cli.arguments import local_path, require_positive
from moebius_jax.cli.terminal import progress, run
from moebius_jax.evaluation.masks import KINDS, MaskSpec, write_set

_EPILOG = """\
kinds:
{kinds}

examples:
  python -m moebius_jax.masks mat_large --count 3000 --output masks/celebahq
  python -m moebius_jax.masks lama_thick --size 256 --count 10000 --seed 7 --output masks/ffhq
  python -m moebius_jax.masks lama_medium --ratio 0.4 0.5 --count 10000 --output masks/places2_test

White is the hole. Mask number i depends on the seed and on i only. The folder gets a README.md with the
polarity, what was drawn and the set's hash; `evaluate.py … --masks DIR --pair-by order` takes it
again, checks that hash and reports it (of a part of the set, that part's).
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    width = max(map(len, KINDS))
    parser = argparse.ArgumentParser(
        prog="python -m moebius_jax.masks",
        description="Draw a set of random inpainting masks.",
        epilog=_EPILOG.format(kinds="\n".join(f"  {k:{width}}  {text}" for k, text in KINDS.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("kind", choices=sorted(KINDS), metavar="KIND", help="see below")
    add("--size", type=int, default=512, metavar="PX", help="side of the masks (default 512)")
    add("--count", type=int, required=True, metavar="N", help="how many; named 000000.png, 000001.png, …")
    add("--seed", type=int, default=0, help="default 0")
    add(
        "--ratio",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="only masks whose hole is this share of the image, e.g. 0.4 0.5",
    )
    add("--output", type=local_path, required=True, metavar="DIR", help="folder to make; must not exist")
    args = parser.parse_args(argv)
    return run(lambda: _draw(args))


def _draw(args: argparse.Namespace) -> int:
    require_positive(args, "count", most=10**7)
    low, high = args.ratio
    spec = MaskSpec(kind=args.kind, size=args.size, seed=args.seed, min_ratio=low, max_ratio=high)
    names = [f"{i:06}" for i in range(args.count)]
    digest = write_set(args.output, spec, names, track=progress)
    print(f"{args.output}: {args.count} masks, white = hole, SHA-256 {digest}")
    return 0
