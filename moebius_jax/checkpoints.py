"""Our own folder of weights: `config.json`, which says what it is, and `weights/`, an Orbax checkpoint.

The tensors are stored under their dotted names in our modules ("down_blocks.0.resnets.0.conv1.…") as a
nested tree, and restore straight onto any sharding: each device reads its own part.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from moebius_jax.errors import UserError, first_line
from moebius_jax.files import replace_when_complete
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
from moebius_jax.models import vae as vae_model
from moebius_jax.models.initializers import KeyStream

Architecture = UNetConfig | VAEConfig | ELatentLPIPSConfig | InceptionConfig
Placement = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None

FORMAT = "moebius-jax"
VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")
STATISTICS = ("mean", "var")  # BatchNorm's running statistics, fp32 in every folder
_KINDS: dict[str, type] = {
    "unet": UNetConfig,
    "vae": VAEConfig,
    "elatentlpips": ELatentLPIPSConfig,
    "inception": InceptionConfig,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """What `config.json` says.

    Attributes:
        architecture: the network's sizes and switches.
        dtype: of the stored parameters.
        source: where the weights came from; for the reader.
    """

    architecture: Architecture
    dtype: str
    source: dict[str, Any]


def save(
    folder: Path,
    architecture: Architecture,
    tensors: Mapping[str, np.ndarray | jax.Array],
    *,
    dtype: str,
    source: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a folder; it appears under its name only when complete.

    Args:
        folder: to make.
        architecture: of the network.
        tensors: dotted name → array; exactly those of `abstract_tensors(architecture)`.
        dtype: name of the parameters' dtype, for config.json.
        source: free-form record of the origin.
        overwrite: replace an existing folder.

    Raises:
        UserError: the folder exists or cannot be written; among several processes, this is not the first or
            the tensors are not NumPy arrays.
        ValueError: the tensors are not those of the architecture.
    """
    expected = abstract_tensors(architecture)
    if set(tensors) != set(expected):
        raise ValueError(
            f"tensors differ from the architecture's: {sorted(set(tensors) ^ set(expected))[:5]}"
        )
    kind = next(name for name, cls in _KINDS.items() if isinstance(architecture, cls))
    config = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "dtype": dtype,
        "architecture": architecture.to_dict(),
        "source": source,
    }
    if jax.process_count() > 1 and (
        jax.process_index() > 0 or not all(isinstance(value, np.ndarray) for value in tensors.values())
    ):
        # Orbax leaves arrays in host memory to process 0, and refuses one process's own device arrays.
        raise UserError(
            f"{folder}: among several processes, folders are written by the first, from NumPy arrays"
        )
    with replace_when_complete(folder, overwrite=overwrite, ours=("config.json", "weights")) as partial:
        partial.mkdir()
        with _orbax_errors(f"{folder}: cannot be written"), _checkpointer() as checkpointer:
            checkpointer.save((partial / "weights").absolute(), nest(tensors))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> FolderConfig:
    """Reads `config.json`.

    Raises:
        UserError: not a folder of ours, or written by a newer version.
    """
    path = folder / "config.json"
    if not path.is_file() or not (folder / "weights").is_dir():
        hint = (
            "; convert it first: python convert_weights.py SOURCE DEST"
            if _has_released_weights(folder)
            else ""
        )
        found = (
            "no such folder" if not folder.exists() else "not a converted folder (config.json and weights/)"
        )
        raise UserError(f"{folder}: {found}{hint}")
    try:
        values = json.loads(path.read_text())
        if values.get("format") != FORMAT:
            raise UserError(f'{path}: not written by {FORMAT} (no "format": "{FORMAT}")')
        if values["version"] > VERSION:
            raise UserError(f"{path}: format version {values['version']}; this release reads up to {VERSION}")
        architecture = _KINDS[values["kind"]].from_dict(values["architecture"])
        if values["dtype"] not in DTYPES:
            raise ValueError(f"dtype {values['dtype']!r}, expected one of {', '.join(DTYPES)}")
        return FolderConfig(architecture=architecture, dtype=values["dtype"], source=dict(values["source"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def load_numpy(folder: Path) -> dict[str, np.ndarray]:
    """All tensors as NumPy arrays by dotted name, in their stored dtypes."""
    config = read_config(folder)
    tree = _restore(
        folder,
        _with_dtype(config, None),
        lambda *_: jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0]),
    )
    return {name: np.asarray(value) for name, value in tree.items()}


def load_unet(
    folder: str | Path,
    *,
    dtype: Dtype = jnp.float32,
    stream_dtype: Dtype = jnp.float32,
    param_dtype: Dtype | None = None,
    placement: Placement = None,
    **changes: Any,
) -> UNet:
    """The U-Net in a converted folder, in evaluation mode.

    Args:
        folder: made by `convert_weights.py` or `save_unet`.
        dtype, stream_dtype: compute dtypes, see `UNet`.
        param_dtype: dtype the parameters are kept in; None keeps the stored one.
        placement: a sharding for every tensor, or a function of (dotted name, shape); None is the default
            device.
        changes: execution fields of `UNetConfig` (`position_order`, `platform`, `remat`).

    Raises:
        UserError: not a folder of a U-Net, or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not isinstance(config.architecture, UNetConfig):
        raise UserError(f"{folder}: holds {_article(describe(config.architecture))}, expected a U-Net")
    kept = jnp.dtype(param_dtype or config.dtype)
    unet = abstract_network(
        config.architecture.replace(**changes), dtype=dtype, stream_dtype=stream_dtype, param_dtype=kept
    )
    fill(unet, _restore(folder, _with_dtype(config, kept), placement))
    unet.eval()
    return unet


def load_vae(
    folder: str | Path,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    placement: Placement = None,
) -> VAE:
    """The VAE in a converted folder; arguments and errors as for `load_unet`."""
    folder = Path(folder)
    config = read_config(folder)
    if not isinstance(config.architecture, VAEConfig):
        raise UserError(f"{folder}: holds {_article(describe(config.architecture))}, expected a VAE")
    tensors = _restore(folder, _with_dtype(config, jnp.dtype(param_dtype)), placement)
    return VAE(params=nest(tensors), config=config.architecture, dtype=dtype)


def load_elatentlpips(
    folder: str | Path,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype | None = None,
    placement: Placement = None,
) -> ELatentLPIPS:
    """The metric network in a converted folder; arguments and errors as for `load_unet`."""
    return _load_metric(Path(folder), ELatentLPIPSConfig, dtype, param_dtype, placement)


def load_inception(
    folder: str | Path,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype | None = None,
    placement: Placement = None,
) -> Inception:
    """FID's network in a converted folder; arguments and errors as for `load_unet`."""
    return _load_metric(Path(folder), InceptionConfig, dtype, param_dtype, placement)


def _load_metric(
    folder: Path, kind: type, dtype: Dtype, param_dtype: Dtype | None, placement: Placement
) -> Any:
    config = read_config(folder)
    if not isinstance(config.architecture, kind):
        found, expected = describe(config.architecture), describe(kind())
        raise UserError(f"{folder}: holds {_article(found)}, expected {_article(expected)}")
    kept = jnp.dtype(param_dtype or config.dtype)
    network = abstract_network(config.architecture, dtype=dtype, param_dtype=kept)
    fill(network, _restore(folder, _with_dtype(config, kept), placement))
    network.eval()
    return network


def save_unet(
    folder: str | Path, unet: UNet, *, source: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Writes a U-Net as a folder `load_unet` reads."""
    tensors = network_tensors(unet)
    dtype = str(jnp.dtype(tensors["conv_norm_out.scale"].dtype))
    save(Path(folder), unet.config, tensors, dtype=dtype, source=source or {}, overwrite=overwrite)


def save_vae(
    folder: str | Path, vae: VAE, *, source: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Writes a VAE as a folder `load_vae` reads."""
    tensors = _flatten(vae.params)
    dtype = str(jnp.dtype(next(iter(tensors.values())).dtype))
    save(Path(folder), vae.config, tensors, dtype=dtype, source=source or {}, overwrite=overwrite)


def digest(network: nnx.Module | VAE) -> str:
    """SHA-256 of a network's tensors: names, shapes, dtypes and values, whatever folder they came from."""
    tensors = _flatten(network.params) if isinstance(network, VAE) else network_tensors(network)
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        array = np.asarray(value)
        total.update(f"{name} {array.dtype} {array.shape}\0".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()


def network_tensors(network: nnx.Module) -> dict[str, jax.Array]:
    """Parameters and BatchNorm statistics of a module by dotted name."""
    return {name: variable[...] for name, variable in _variables(network).items()}


@functools.cache
def abstract_tensors(architecture: Architecture) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Dotted name → shape and fp32 dtype of every tensor of an architecture."""
    if isinstance(architecture, VAEConfig):
        return _flatten(vae_model.abstract_params(architecture))
    network = abstract_network(architecture)
    return {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in _variables(network).items()}


def count_parameters(architecture: Architecture) -> int:
    """Trainable numbers of an architecture; BatchNorm's statistics are not among them."""
    tensors = abstract_tensors(architecture)
    return sum(a.size for name, a in tensors.items() if name.rpartition(".")[2] not in STATISTICS)


def abstract_network(
    architecture: UNetConfig | ELatentLPIPSConfig | InceptionConfig,
    *,
    param_dtype: Dtype = jnp.float32,
    **dtypes: Dtype,
) -> UNet | ELatentLPIPS | Inception:
    """A network of shapes instead of arrays, to be filled; `dtypes` are the network's other ones."""
    networks = {UNetConfig: UNet, ELatentLPIPSConfig: ELatentLPIPS, InceptionConfig: Inception}
    cls = networks[type(architecture)]
    return nnx.eval_shape(
        lambda: cls(architecture, param_dtype=param_dtype, rngs=KeyStream(jax.random.key(0)), **dtypes)
    )


def describe(architecture: Architecture) -> str:
    """A name for messages: "student", "teacher", "ablation 8", "VAE", …"""
    others = {
        VAEConfig: "VAE",
        ELatentLPIPSConfig: "E-LatentLPIPS network",
        InceptionConfig: "Inception network",
    }
    if not isinstance(architecture, UNetConfig):
        return others[type(architecture)]
    switches = _switches(architecture)
    if switches == _switches(UNetConfig.student()):
        return "student"
    if switches == _switches(UNetConfig.teacher()):
        return "teacher"
    for experiment in (1, 2, 3, 4, 5, 6, 8):
        if switches == _switches(UNetConfig.ablation(experiment)):
            return f"ablation {experiment}"
    return "U-Net"


def _switches(config: UNetConfig) -> tuple[Any, ...]:
    return (
        config.self_mixer,
        config.cross_mixer,
        config.feed_forward,
        config.residual_conv,
        config.mid_block,
    )


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouEI' else 'a'} {noun}"


def _variables(network: nnx.Module) -> dict[str, nnx.Variable]:
    state = nnx.state(network, (nnx.Param, nnx.BatchStat))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def fill(network: nnx.Module, tensors: Mapping[str, jax.Array]) -> None:
    """Gives an abstract network its arrays."""
    state = nnx.state(network, (nnx.Param, nnx.BatchStat))
    flat = [(path, var.replace(tensors[".".join(map(str, path))])) for path, var in nnx.to_flat_state(state)]
    nnx.update(network, nnx.from_flat_state(flat))


def _with_dtype(config: FolderConfig, dtype: Dtype | None) -> dict[str, jax.ShapeDtypeStruct]:
    kept = dtype or jnp.dtype(config.dtype)
    return {
        name: jax.ShapeDtypeStruct(a.shape, jnp.float32 if name.rpartition(".")[2] in STATISTICS else kept)
        for name, a in abstract_tensors(config.architecture).items()
    }


def _restore(
    folder: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], placement: Placement
) -> dict[str, jax.Array]:
    if placement is None:
        placement = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = placement if callable(placement) else lambda *_: placement
    targets = {
        n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(n, a.shape)) for n, a in abstract.items()
    }
    problem = f"{folder / 'weights'}: damaged, or not of the network in config.json"
    with _orbax_errors(problem), _checkpointer() as checkpointer:
        return _flatten(checkpointer.restore((folder / "weights").absolute(), nest(targets)))


def _checkpointer() -> Any:
    """An Orbax checkpointer that works for this process alone.

    Among several processes Orbax would have all wait for each other; here each reads what its own devices
    need, when it needs it.
    """
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process-{me}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


@contextlib.contextmanager
def _orbax_errors(problem: str) -> Iterator[None]:
    """Makes one `UserError` of whatever the storage libraries raise, which is of no common type."""
    # Their other pending reads and writes fail too, and would each be logged with a traceback.
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem} ({first_line(error)})") from None
    finally:
        gc.collect()  # forgotten futures report when they are collected
        logger.setLevel(level)


def _has_released_weights(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("**/diffusion_pytorch_model.*"))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names → nested dictionaries."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
