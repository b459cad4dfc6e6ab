"""The kinds of networks there are: what stands in config.json, and which classes it means."""

import dataclasses

from flax import nnx

from moebius_jax.models import (
    VAE,
    ELatentLPIPS,
    ELatentLPIPSConfig,
    Inception,
    InceptionConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)
from moebius_jax.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        architecture: its configuration.
        network: built as `network(architecture, dtype=…, param_dtype=…, rngs=…)`.
    """

    architecture: type[Architecture]
    network: type[nnx.Module]


KINDS: dict[str, Kind] = {
    "unet": Kind(UNetConfig, UNet),
    "vae": Kind(VAEConfig, VAE),
    "elatentlpips": Kind(ELatentLPIPSConfig, ELatentLPIPS),
    "inception": Kind(InceptionConfig, Inception),
}


def kind_of(architecture: Architecture) -> str:
    """The key of an architecture in `KINDS`."""
    return next(name for name, kind in KINDS.items() if kind.architecture is type(architecture))
