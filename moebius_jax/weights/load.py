"""Networks out of our folders, onto any devices, and into them."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from moebius_jax.buckets import fetched
from moebius_jax.errors import UserError
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
from moebius_jax.weights.folder import FolderConfig, Placement, read_config, restore, save
from moebius_jax.weights.tensors import Bare, abstract_network, network_tensors, statistics_of


def load_network(
    folder: str | Path,
    expected: type[Architecture],
    *,
    param_dtype: Dtype | None = None,
    placement: Placement = None,
    changes: dict[str, Any] | None = None,
    verify: bool = True,
    **dtypes: Dtype,
) -> nnx.Module:
    """The network in a converted folder, in evaluation mode.

    Args:
        folder: made by `convert_weights.py` or a `save` function; one in a bucket is fetched.
        expected: what it has to be.
        param_dtype: dtype the parameters are kept in; None keeps the stored one.
        placement: a sharding for every tensor, or a function of (dotted name, shape); None is the default
            device.
        changes: execution fields of the architecture.
        verify: compare the folder's files with their checksums first.
        dtypes: compute dtypes the network takes.

    Raises:
        UserError: not such a folder, or damaged.
    """
    folder = fetched(folder)
    config = _require(folder, expected)
    kept = jnp.dtype(param_dtype or config.dtype)
    bare = Bare(abstract_network(config.architecture.replace(**changes or {}), param_dtype=kept, **dtypes))
    network = bare(restore(folder, bare.shapes, placement=placement, verify=verify))
    network.eval()
    return network


def load_unet(
    folder: str | Path,
    *,
    dtype: Dtype = jnp.float32,
    stream_dtype: Dtype = jnp.float32,
    param_dtype: Dtype | None = None,
    placement: Placement = None,
    verify: bool = True,
    **changes: Any,
) -> UNet:
    """The U-Net in a converted folder, in evaluation mode.

    Args:
        folder, param_dtype, placement, verify: see `load_network`.
        dtype, stream_dtype: compute dtypes, see `UNet`.
        changes: execution fields of `UNetConfig` (`position_order`, `platform`, `remat`).

    Raises:
        UserError: not a folder of a U-Net, or damaged.
    """
    return load_network(
        folder,
        UNetConfig,
        param_dtype=param_dtype,
        placement=placement,
        changes=changes,
        verify=verify,
        dtype=dtype,
        stream_dtype=stream_dtype,
    )


def load_vae(folder: str | Path, *, param_dtype: Dtype | None = jnp.float32, **options: Any) -> VAE:
    """The VAE in a converted folder; options and errors as for `load_network`."""
    return load_network(folder, VAEConfig, param_dtype=param_dtype, **options)


def load_elatentlpips(folder: str | Path, **options: Any) -> ELatentLPIPS:
    """The metric network in a converted folder; options and errors as for `load_network`."""
    return load_network(folder, ELatentLPIPSConfig, **options)


def load_inception(folder: str | Path, **options: Any) -> Inception:
    """FID's network in a converted folder; options and errors as for `load_network`."""
    return load_network(folder, InceptionConfig, **options)


def save_network(
    folder: str | Path,
    network: nnx.Module,
    *,
    source: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a network as a folder the `load` functions read.

    Args:
        folder: to make.
        network: with its arrays.
        source: free-form record of where the weights came from.
        overwrite: replace an existing folder.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    tensors, statistics = network_tensors(network), statistics_of(network.config)
    dtype = next(value.dtype for name, value in tensors.items() if name not in statistics)
    save(Path(folder), network.config, tensors, dtype=str(dtype), source=source or {}, overwrite=overwrite)


save_unet = save_vae = save_network


def _require(folder: Path, expected: type[Architecture]) -> FolderConfig:
    config = read_config(folder)
    if not isinstance(config.architecture, expected):
        found = config.architecture.describe()
        raise UserError(f"{folder}: holds {_article(found)}, expected {_article(expected.NOUN)}")
    return config


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouEI' else 'a'} {noun}"
