"""Encodes the samples of a training configuration into a folder of latents."""

import argparse
import dataclasses
import hashlib
import sys
from pathlib import Path

from moebius_jax.cli.common import enable_compilation_cache, progress, require_training_extra, run
from moebius_jax.errors import UserError

DESCRIPTION = """\
Runs the encoder once over the images of a training configuration, so that training need not.

    python cache_latents.py configs/distill.py latents/ data.path=train.jsonl --draws 4
    python train.py configs/distill.py data.kind=latents data.path=latents/

What is kept are whole samples: crop, flip and hole as they were drawn, DRAWS of them for every image, 130 KB
each at 512 pixels. Training then sees these draws again in every epoch; only noise, timesteps and the
encoder's own sampling stay random. More draws, more variety: random masks need the masked image's latents, so
a hole cannot be drawn anew without the encoder.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a file of configs/; its data and vae are used")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields to change")
    parser.add_argument("--draws", type=int, default=4, help="samples per image (default: 4)")
    parser.add_argument("--batch-size", type=int, default=16, help="images encoded at a time (default: 16)")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_intermixed_args()  # options may stand between KEY=VALUEs


def main() -> int:
    args = parse()
    return run(lambda: cache(args))


def cache(args: argparse.Namespace) -> int:
    """Writes the folder; returns the exit status."""
    if args.draws < 1 or args.batch_size < 1:
        raise UserError("--draws and --batch-size must be 1 or more")

    require_training_extra()
    import jax
    import numpy as np

    from moebius_jax.data.config import open_source
    from moebius_jax.data.latent_cache import FILES, INDEX, CacheInfo, CacheWriter
    from moebius_jax.data.loader import Loader
    from moebius_jax.files import replace_when_complete
    from moebius_jax.training.encode import check_images, latent_batch, to_devices
    from moebius_jax.training.launch import load_config
    from moebius_jax.training.networks import load_vae
    from moebius_jax.training.overrides import describe
    from moebius_jax.training.sharding import make_mesh

    # Losses, teacher and metric do not matter here.
    config = load_config(args.config, [*args.overrides, "data.kind=images", "loss.terms=task"])
    mesh = make_mesh(1)
    vae = load_vae(config, mesh)
    check_images(config, vae)
    enable_compilation_cache()
    source = open_source(config.data, config.student.latent_size)
    batch_size = -(-args.batch_size // mesh.size) * mesh.size
    samples = len(source.names) * args.draws
    loader = Loader(
        source,
        config.data.loader,
        seed=config.seed,
        global_batch=batch_size,
        warn=lambda message: print(f"warning: {message}", file=sys.stderr),
    )
    info = CacheInfo(
        samples=samples,
        side=config.student.latent_size,
        vae=_digest(jax.device_get(vae.params)),
        made_of={"images": len(source.names), "draws": args.draws, **describe(config.data, "data.")},
    )
    ours = (INDEX, *(f"{name}.npy" for name in FILES))
    with replace_when_complete(args.output, overwrite=args.overwrite, ours=ours) as partial:
        partial.mkdir()
        writer = CacheWriter(partial, info)
        done = 0
        for _ in progress(range(-(-samples // batch_size)), desc="batches"):
            batch = latent_batch(to_devices(next(loader), mesh), vae)
            arrays = {f.name: np.asarray(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
            count = min(batch_size, samples - done)
            writer.add({name: arrays[name][:count] for name in FILES})
            done += count
        writer.close()
    loader.close()
    print(f"{samples:,} samples of {len(source.names):,} images: {args.output}")
    return 0


def _digest(params: dict) -> str:
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
