"""`cache_latents.py`: encodes the samples of a training configuration into a folder of latents."""

import argparse
import sys

from moebius_jax.cli.arguments import any_location, require_positive
from moebius_jax.cli.terminal import enable_compilation_cache, progress, require_extra, run

DESCRIPTION = """\
Runs the encoder once over the images of a training configuration, so that training need not.

    python cache_latents.py configs/distill.py latents/ data.path=train.jsonl --draws 4
    python train.py configs/distill.py data.kind=latents data.path=latents/

What is kept are whole samples: crop, flip and hole as they were drawn, DRAWS of them for every image, 130 KB
each at 512 pixels. Training then sees these draws again in every epoch; only noise, timesteps and the
encoder's own sampling stay random. More draws, more variety: random masks need the masked image's latents, so
a hole cannot be drawn anew without the encoder.
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="cache_latents.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", help="a file of configs/, or one of your own; its data and vae are used")
    add("output", type=any_location, help="folder to write, here or gs://…")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="fields to change")
    add("--draws", type=int, default=4, help="samples per image (default: 4)")
    add("--batch-size", type=int, default=16, help="images encoded at a time (default: 16)")
    add("--overwrite", action="store_true")
    args = parser.parse_intermixed_args(argv)  # options may stand between KEY=VALUEs
    return run(lambda: _cache(args))


def _cache(args: argparse.Namespace) -> int:
    require_positive(args, "draws", most=10**6)
    require_positive(args, "batch_size", most=2**16)
    require_extra("train", "optax", "grain")
    from moebius_jax.training.caching import cache_latents
    from moebius_jax.training.config_file import load_config

    # Losses, teacher and metric do not matter here.
    config = load_config(args.config, [*args.overrides, "data.kind=images", "loss.terms=task"])
    enable_compilation_cache()
    info = cache_latents(
        config,
        args.output,
        draws=args.draws,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        warn=lambda message: print(f"warning: {message}", file=sys.stderr),
        track=progress,
    )
    print(f"{info.samples:,} samples of {info.made_of['images']:,} images: {args.output}")
    return 0
