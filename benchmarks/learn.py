"""Does distillation help? A teacher and small students, trained on photographs and compared on others.

    python -m benchmarks.learn prepare --photos FOLDER … --work WORK   # tiles; every fourth held out
    python -m benchmarks.learn vae --work WORK                         # a small autoencoder
    python -m benchmarks.learn train --work WORK                       # teacher, then students, by train.py
    python -m benchmarks.learn score --work WORK                       # the table

In the manner of the paper's Table 5 and of Table 2's rows 9 and 10: students of one architecture, the same
number of steps, the same data and seed, with different losses. The perceptual term is left out: its weights
are the user's to download. Scored on the held-out photographs: the task loss, and L1 and LPIPS of images
whose hole was inpainted. RESULTS.md used the photographs of Debian's plasma-workspace-wallpapers and
mate-backgrounds, and scikit-image's. Needs the `train` and `eval` extras.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import parser, report, told
from benchmarks.learn_config import get_config
from moebius_jax.imaging.picture import open_image

ROOT = Path(__file__).parents[1]
TILE, SIZE = 96, 64
STUDENTS = {
    "task": "loss.terms=task",
    "coarse": "loss.terms=coarse",
    "coarse + fine": "loss.terms=coarse,fine",
    "coarse + fine + task": "loss.terms=coarse,fine,task",
    "coarse + fine + task, release weights": "loss.terms=coarse,fine,task loss.balance=release",
}


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("stage", choices=["prepare", "vae", "train", "score"])
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--photos", type=Path, nargs="*", default=[], help="folders of photographs")
    options.add_argument("--tiles", type=int, default=60, help="cut from each photograph")
    options.add_argument("--vae-steps", type=int, default=800)
    options.add_argument("--teacher-steps", type=int, default=3000)
    options.add_argument("--student-steps", type=int, default=1500)
    options.add_argument("--only", nargs="*", help="students to train, by position in the table")
    return options.parse_args()


def prepare(args: argparse.Namespace) -> None:
    """Random squares of every photograph, at several scales, as small files."""
    import skimage.data

    pictures = [
        p for folder in args.photos for p in sorted(folder.rglob("*")) if p.suffix in (".jpg", ".png")
    ]
    arrays = {p.stem: np.asarray(open_image(p).convert("RGB")) for p in pictures}
    arrays |= {n: getattr(skimage.data, n)() for n in ("astronaut", "chelsea", "coffee", "rocket")}
    rng = np.random.default_rng(0)
    for i, (name, array) in enumerate(sorted(arrays.items())):
        folder = args.work / ("held_out" if i % 4 == 3 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        short = min(array.shape[:2])
        image = Image.fromarray(array).resize(
            [round(n * 384 / short) for n in array.shape[1::-1]], Image.Resampling.LANCZOS
        )
        for k in range(args.tiles):
            side = int(rng.integers(TILE, 385))
            x, y = (int(rng.integers(n - side + 1)) for n in image.size)
            tile = image.crop((x, y, x + side, y + side)).resize((TILE, TILE), Image.Resampling.LANCZOS)
            tile.save(folder / f"{name}_{k:03d}.png")
    counts = {f: len(list((args.work / f).glob("*"))) for f in ("train", "held_out")}
    print(f"{len(arrays)} photographs, tiles: {counts}")


def tiles(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(open_image(p)) for p in sorted(folder.glob("*.png"))])


def train_vae(args: argparse.Namespace) -> None:
    """A factor-4 autoencoder, L1 and a little KL, written as a converted folder."""
    import jax
    import jax.numpy as jnp
    import optax

    from moebius_jax.models import VAE, VAEConfig
    from moebius_jax.models.initializers import KeyStream
    from moebius_jax.weights.load import save_vae

    config = VAEConfig(channels=(32, 64, 64), layers_per_block=1, scaling_factor=1.0)
    vae = VAE(config, rngs=KeyStream(jax.random.key(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, args.vae_steps))
    state = optimizer.init(vae)

    def loss(vae: VAE, images: jax.Array, key: jax.Array) -> jax.Array:
        posterior = vae.posterior(images)
        latents = posterior.mean + posterior.std * jax.random.normal(key, posterior.mean.shape)
        kl = 0.5 * jnp.mean(posterior.mean**2 + posterior.std**2 - 1 - posterior.logvar)
        return jnp.abs(vae.decode(latents) - images).mean() + 1e-4 * kl

    @jax.jit
    def step(vae: VAE, state: Any, images: jax.Array, key: jax.Array) -> tuple[VAE, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(vae, images, key)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(vae, updates), state, value

    data, rng = tiles(args.work / "train"), np.random.default_rng(0)
    for i in range(args.vae_steps):
        chosen = data[rng.integers(len(data), size=16)]
        x, y = rng.integers(TILE - SIZE + 1, size=2)
        images = chosen[:, y : y + SIZE, x : x + SIZE].astype(np.float32) / 127.5 - 1
        vae, state, value = step(vae, state, images, jax.random.key(i))
        if i % 50 == 0:
            print(i, float(value), flush=True)
    latents = jax.jit(vae.encode)(data[:256, :SIZE, :SIZE].astype(np.float32) / 127.5 - 1)
    vae.config = config.replace(scaling_factor=float(1 / latents.std()))
    save_vae(args.work / "vae", vae, overwrite=True)
    print(f"scaling factor {vae.config.scaling_factor:.3f}")


def run(*command: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def train(args: argparse.Namespace) -> None:
    """Latents, teacher, students."""
    work, config = args.work.resolve(), "benchmarks/learn_config.py"
    vae = f"vae={work / 'vae'}"
    for name, draws in (("train", 4), ("held_out", 1)):
        if not (work / f"latents_{name}").exists():
            run("cache_latents.py", config, str(work / f"latents_{name}"), vae, f"data.path={work / name}",
                "--draws", str(draws))  # fmt: skip
    common = [vae, f"data.path={work / 'latents_train'}", f"log.validation={work / 'latents_held_out'}"]
    if not (work / "teacher" / "model").exists():
        run("train.py", "benchmarks/learn_teacher.py", "--workdir", str(work / "teacher"), *common,
            f"steps={args.teacher_steps}")  # fmt: skip
    for i, (name, losses) in enumerate(STUDENTS.items()):
        if args.only and str(i) not in args.only:
            continue
        print(f"--- {name}")
        run("train.py", config, "--workdir", str(work / f"student_{i}"), *common, *losses.split(),
            f"teacher={work / 'teacher' / 'model' / 'unet'}", f"steps={args.student_steps}")  # fmt: skip


def score(args: argparse.Namespace) -> int:
    """Task loss, and LPIPS and L1 inside the hole of inpainted held-out tiles."""
    models = {"teacher": args.work / "teacher"}
    models |= {name: args.work / f"student_{i}" for i, name in enumerate(STUDENTS)}
    there = {name: folder / "model" for name, folder in models.items() if (folder / "model").exists()}
    return report(told({"losses": name} | score_one(model, args.work) for name, model in there.items()), args)


def score_one(model: Path, work: Path) -> dict[str, float]:
    from moebius_jax import MoebiusInpaintPipeline, evaluate
    from moebius_jax.data.datasets import LatentDataset, Source
    from moebius_jax.sharding import make_mesh
    from moebius_jax.training.state import bare_student
    from moebius_jax.training.validation import Validation
    from moebius_jax.weights.tensors import network_tensors

    pipeline = MoebiusInpaintPipeline.from_pretrained(model)
    config, mesh = get_config().replace(student=pipeline.unet.config), make_mesh()
    held_out = LatentDataset(Source(path=work / "latents_held_out", latent_shape=config.student.latent_shape))
    validation = Validation(config, mesh, bare_student(config, mesh), None, held_out)
    found = evaluate(
        pipeline,
        work / "held_out",
        metrics=("lpips", "l1"),
        size=SIZE,
        mask_kind="lama_medium",
        guidance_scale=1.0,  # these networks were never shown foreground samples
    ).summary
    quality = {key: found[key]["hole"] for key in ("lpips_alex", "l1")}
    return validation(network_tensors(pipeline.unet)) | quality


if __name__ == "__main__":
    arguments = parse()
    stages = {"prepare": prepare, "vae": train_vae, "train": train, "score": score}
    sys.exit(stages[arguments.stage](arguments))
