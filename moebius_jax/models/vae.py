"""The image autoencoder: diffusers' `FlaxAutoencoderKL` behind one small NHWC interface.

diffusers is imported on first use: it takes seconds, and it loads torch where torch is installed.
"""

import functools
import logging
import re
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Float
from pydantic import Field

from moebius_jax.models.architecture import Architecture
from moebius_jax.models.released import CONV, LINEAR, SAME, Released
from moebius_jax.schema import Above0, AtLeastOne, checked

Params = dict[str, Any]


@checked
class VAEConfig(Architecture):
    """Sizes of a KL autoencoder of the SDXL layout (docs/model.md, "VAE"); the defaults are the released one.

    Attributes:
        channels: width of each level; every level but the last halves the map.
        layers_per_block: residual blocks of an encoder level; a decoder level has one more.
        latent_channels: of a latent; the encoder yields twice as many (mean, logvar).
        scaling_factor: latents are multiplied by it after encoding, divided before decoding.
    """

    NOUN: ClassVar[str] = "VAE"

    channels: Annotated[tuple[AtLeastOne, ...], Field(min_length=1)] = (128, 256, 512, 512)
    layers_per_block: AtLeastOne = 2
    latent_channels: AtLeastOne = 4
    scaling_factor: Above0 = 0.13025

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side (8 in the release)."""
        return 2 ** (len(self.channels) - 1)


@struct.dataclass
class Posterior:
    """Diagonal Gaussian over latents, before scaling; all [B, h, w, latent_channels], fp32."""

    mean: Float[Array, "B h w c"]
    logvar: Float[Array, "B h w c"]

    @property
    def std(self) -> Float[Array, "B h w c"]:
        return jnp.exp(0.5 * self.logvar)

    def sample(self, noise: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """The draw that standard-normal `noise` stands for."""
        return self.mean + self.std * noise


@struct.dataclass
class VAE:
    """Encoder and decoder with their weights; a pytree, so it may be an argument of a jitted function.

    Attributes:
        params: diffusers' parameter tree.
        config: sizes.
        dtype: compute dtype. Half precision is faster, but SDXL decoders are known to overflow in fp16.
    """

    params: Params
    config: VAEConfig = struct.field(pytree_node=False)
    dtype: Dtype = struct.field(pytree_node=False, default=jnp.float32)

    def posterior(self, images: Float[Array, "B H W 3"]) -> Posterior:
        """Encodes images in [-1, 1]; H and W multiples of `config.factor`."""
        module = _module(self.config, jnp.dtype(self.dtype))
        nchw = jnp.transpose(images, (0, 3, 1, 2)).astype(self.dtype)
        dist = module.apply({"params": self.params}, nchw, method=module.encode).latent_dist
        return Posterior(mean=dist.mean.astype(jnp.float32), logvar=dist.logvar.astype(jnp.float32))

    def encode(
        self, images: Float[Array, "B H W 3"], noise: Float[Array, "B h w c"] | None = None
    ) -> Float[Array, "B h w c"]:
        """Scaled latents: the posterior's mean, or with standard-normal `noise` its sample."""
        posterior = self.posterior(images)
        return self.scaled(posterior.mean if noise is None else posterior.sample(noise))

    def scaled(self, latents: Float[Array, "B h w d"]) -> Float[Array, "B h w d"]:
        """Latents as the U-Nets see them: of about unit variance."""
        return latents * self.config.scaling_factor

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Images, nominally in [-1, 1], fp32, of scaled latents."""
        module = _module(self.config, jnp.dtype(self.dtype))
        # diffusers tells NHWC latents from NCHW ones by their last axis.
        unscaled = (latents / self.config.scaling_factor).astype(self.dtype)
        images = module.apply({"params": self.params}, unscaled, method=module.decode).sample
        return jnp.transpose(images, (0, 2, 3, 1)).astype(jnp.float32)


def abstract_params(config: VAEConfig) -> Params:
    """The parameter tree as shapes."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def released(path: str, rank: int) -> Released:
    """How the release keeps the parameter `path` (dotted) of this rank."""
    name = path
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    if not path.endswith(".kernel"):
        return Released(name, SAME)
    return Released(name, CONV if rank == 4 else LINEAR)


# diffusers' Flax names → its torch names, in order.
_RENAMES = (
    (r"(blocks|resnets|attentions|samplers)_(\d+)", r"\1.\2"),
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
    (r"\.(kernel|scale)$", ".weight"),
)


def init_params(config: VAEConfig, key: Array) -> Params:
    """Freshly drawn parameters, fp32."""
    module = _module(config, jnp.dtype(jnp.float32))
    images = jnp.zeros((1, 3, 2 * config.factor, 2 * config.factor))
    return module.init(key, images)["params"]


@functools.lru_cache(maxsize=8)
def _module(config: VAEConfig, dtype: Dtype) -> Any:
    from diffusers.models.vae_flax import FlaxAutoencoderKL

    # Every construction announces that diffusers 0.40 removes these classes. pyproject.toml pins < 0.40.
    logger = logging.getLogger("diffusers.models.vae_flax")
    if _drop_deprecation not in logger.filters:
        logger.addFilter(_drop_deprecation)
    levels = len(config.channels)
    return FlaxAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        scaling_factor=config.scaling_factor,
        dtype=dtype,
    )


def _drop_deprecation(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Flax classes are deprecated")
