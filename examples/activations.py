"""Draws what networks look at: the maps between their levels, a row for each network (as the paper's Fig. 4).

    python examples/activations.py STUDENT TEACHER --image photo.jpg --mask mask.png --output maps.png

A map is drawn by the mean of its channels' magnitudes. All networks see the picture as one square of their
own size, noised by the same numbers where their latents are of one size. Below a map that is as large as the
first network's at the same place stands its correlation with that. Needs the `eval` extra.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from moebius_jax import MoebiusInpaintPipeline
from moebius_jax.cli.arguments import any_location, local_path
from moebius_jax.cli.terminal import run
from moebius_jax.diffusion.denoise import network_input
from moebius_jax.diffusion.draws import Draw, draw_normal, sample_keys
from moebius_jax.diffusion.schedule import TRAIN_STEPS, add_noise
from moebius_jax.errors import UserError
from moebius_jax.files import replace_when_complete
from moebius_jax.imaging.picture import read_mask, read_picture
from moebius_jax.inpaint.latents import encode

Maps = dict[str, np.ndarray]  # by place: [H, W]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="converted folders, Hub repositories, or tiny")
    add("--vae", type=any_location, help="folder of a converted VAE (default: beside each model)")
    add("--image", type=local_path, required=True)
    add("--mask", type=local_path, required=True, help="white: repaint")
    add("--output", type=local_path, required=True, metavar="PNG")
    add("--timestep", type=int, default=500, help=f"0 to {TRAIN_STEPS - 1}: how noisy (default 500)")
    add("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    return run(lambda: _activations(args))


def _activations(args: argparse.Namespace) -> int:
    if not 0 <= args.timestep < TRAIN_STEPS:
        raise UserError(f"--timestep is {args.timestep}; expected 0 to {TRAIN_STEPS - 1}")
    image, mask = Image.fromarray(read_picture(args.image).rgb), Image.fromarray(read_mask(args.mask))
    rows = {}
    for model in args.models:
        print(f"{model}: loading, and one pass", file=sys.stderr)
        pipeline = MoebiusInpaintPipeline.from_pretrained(model, vae=args.vae, dtype="float32")
        rows[model] = maps_of(pipeline, image, mask, args.timestep)
    with replace_when_complete(args.output, overwrite=args.overwrite) as partial:
        draw(partial, rows)
    print(args.output)
    return 0


def maps_of(pipeline: MoebiusInpaintPipeline, image: Image.Image, mask: Image.Image, timestep: int) -> Maps:
    """Mean magnitudes of the U-Net's features, as a background sample at one timestep."""
    unet, side = pipeline.unet, pipeline.sampler.image_size
    pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))[None]
    hole = np.asarray(mask.resize((side, side)))[None] > 127
    keys = sample_keys(jnp.zeros((1, 3), jnp.uint32))
    image_noise, masked_noise, noise = (
        draw_normal(keys, what, unet.config.latent_shape)
        for what in (Draw.IMAGE_POSTERIOR, Draw.MASKED_POSTERIOR, Draw.NOISE)
    )
    conditions = encode(pipeline.vae, pixels, hole, image_noise, masked_noise)
    t = jnp.array([timestep])
    noisy = add_noise(conditions.image_latents, noise, t)
    ids = jnp.asarray(unet.config.category_ids)[:1]
    inputs = network_input(noisy, conditions.mask, conditions.masked_latents)
    features = jax.jit(lambda unet, *seen: unet(*seen).features)(unet, inputs, t, ids)
    levels, mid = len(unet.config.channels), unet.config.mid_block
    places = [f"down {i}" for i in range(levels)] + ["mid"] * mid + [f"up {i}" for i in range(levels)]
    return {
        place: np.asarray(jnp.abs(x[0].astype(jnp.float32)).mean(-1))
        for place, x in zip(places, features, strict=True)
    }


def draw(path: Path, rows: dict[str, Maps]) -> None:
    """The picture: a row for each network, a column for each place that any of them has."""
    from matplotlib.figure import Figure

    first = next(iter(rows.values()))
    places = list(dict.fromkeys(place for maps in rows.values() for place in maps))
    figure = Figure(figsize=(2 * len(places), 2.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(places), squeeze=False)
    for line, (model, maps) in zip(axes, rows.items(), strict=True):
        for axis, place in zip(line, places, strict=True):
            axis.set(xticks=[], yticks=[])
            if place not in maps:
                axis.axis("off")
                continue
            axis.imshow(maps[place], cmap="viridis", interpolation="nearest")
            axis.set_title(f"{place}, {maps[place].shape[0]} x {maps[place].shape[1]}", fontsize=8)
            if maps is not first and place in first and maps[place].shape == first[place].shape:
                r = np.corrcoef(maps[place].ravel(), first[place].ravel())[0, 1]
                axis.set_xlabel(f"correlation {r:.2f}", fontsize=8)
        line[0].set_ylabel(Path(model).name, fontsize=8)
    figure.savefig(path, dpi=120, format="png")


if __name__ == "__main__":
    sys.exit(main())
