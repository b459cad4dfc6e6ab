"""Our own folder of weights: `config.json`, which says what it is, `weights/`, an Orbax checkpoint, and
`SHA256SUMS`, which loading compares both with.

The tensors are stored under their dotted names in our modules ("down_blocks.0.resnets.0.conv1.…") as a
nested tree, and restore straight onto any sharding: each device reads its own part.
"""

import contextlib
import dataclasses
import gc
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moebius_jax.errors import UserError, first_line
from moebius_jax.files import replace_when_complete
from moebius_jax.models.architecture import Architecture
from moebius_jax.schema import checked, one_of, read_json
from moebius_jax.weights import checksums
from moebius_jax.weights.kinds import KINDS, kind_of
from moebius_jax.weights.tensors import Bare, abstract_network, abstract_tensors, flatten, nest

VAE_VERSION = 2  # in 1 its tensors had other names

Placement = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None


@checked
class _ConfigFile:
    """`config.json` as it is written."""

    format: Literal["moebius-jax"]
    version: Literal[1, 2]
    kind: Annotated[str, one_of(KINDS)]
    dtype: Literal["float32", "float16", "bfloat16"]
    architecture: dict[str, Any]
    source: dict[str, Any]


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
    config = _ConfigFile(
        format="moebius-jax",
        version=VAE_VERSION if kind_of(architecture) == "vae" else 1,
        kind=kind_of(architecture),
        dtype=dtype,
        architecture=architecture.to_dict(),
        source=source,
    )
    if jax.process_count() > 1 and (
        jax.process_index() > 0 or not all(isinstance(value, np.ndarray) for value in tensors.values())
    ):
        # Orbax leaves arrays in host memory to process 0, and refuses one process's own device arrays.
        raise UserError(
            f"{folder}: among several processes, folders are written by the first, from NumPy arrays"
        )
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder / "config.json"):
        raise UserError(f"{folder}: not replaced, it is no folder we wrote")
    with replace_when_complete(
        folder, overwrite=overwrite, ours=("config.json", "weights", checksums.FILE)
    ) as partial:
        partial.mkdir()
        with orbax_errors(f"{folder}: cannot be written"), _checkpointer() as checkpointer:
            checkpointer.save((partial / "weights").absolute(), nest(tensors))
        (partial / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        checksums.write_checksums(partial)


def is_ours(config: Path) -> bool:
    """Whether a `config.json` or a manifest is of ours, even where it cannot be read any more."""
    with contextlib.suppress(OSError):
        return b"moebius-jax" in config.read_bytes()
    return False


def is_outdated(folder: Path) -> bool:
    """Whether it is a VAE of an older version, whose tensors have other names."""
    try:
        found = read_json(folder / "config.json", _ConfigFile)
    except (UserError, OSError):
        return False
    return _is_outdated(found)


def _is_outdated(found: _ConfigFile) -> bool:
    return found.kind == "vae" and found.version < VAE_VERSION


def read_config(folder: Path) -> FolderConfig:
    """Reads `config.json`.

    Raises:
        UserError: not a folder of ours, written by a newer version, or a VAE written by an older one.
    """
    path = folder / "config.json"
    if not path.is_file() or not (folder / "weights").is_dir():
        released = folder.is_dir() and any(folder.glob("**/diffusion_pytorch_model.*"))
        hint = "; convert it first: python convert_weights.py SOURCE DEST" if released else ""
        found = (
            "no such folder" if not folder.exists() else "not a converted folder (config.json and weights/)"
        )
        raise UserError(f"{folder}: {found}{hint}")
    found = read_json(path, _ConfigFile)
    if _is_outdated(found):
        raise UserError(
            f"{folder}: a VAE as moebius-jax 0.1 kept it; convert its release file again "
            "(convert_weights.py), and name that folder with vae= or --vae"
        )
    try:
        architecture = KINDS[found.kind].architecture.from_dict(found.architecture)
    except ValueError as error:
        raise UserError(f"{path}: architecture.{error}") from None
    return FolderConfig(architecture=architecture, dtype=found.dtype, source=found.source)


def load_numpy(folder: Path) -> dict[str, np.ndarray]:
    """All tensors as NumPy arrays by dotted name, in their stored dtypes."""
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    config = read_config(folder)
    shapes = Bare(abstract_network(config.architecture, param_dtype=jnp.dtype(config.dtype))).shapes
    tensors = restore(folder, shapes, placement=cpu)
    return {name: np.asarray(value) for name, value in tensors.items()}


def restore(
    folder: Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    placement: Placement = None,
    verify: bool = True,
) -> dict[str, jax.Array]:
    """The tensors of a folder, by dotted name.

    Args:
        folder: with `weights/`.
        shapes: by dotted name, shape and dtype of each as it is wanted, whatever dtype it is stored in.
        placement: a sharding for every tensor, or a function of (dotted name, shape); None is the default
            device.
        verify: compare the folder's files with their checksums first.

    Raises:
        UserError: damaged.
    """
    if verify:
        _verify(folder)
    if placement is None:
        placement = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = placement if callable(placement) else lambda *_: placement
    targets = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(name, a.shape))
        for name, a in shapes.items()
    }
    problem = f"{folder / 'weights'}: damaged, or not of the network in config.json"
    with orbax_errors(problem), _checkpointer() as checkpointer:
        return flatten(checkpointer.restore((folder / "weights").absolute(), nest(targets)))


def _verify(folder: Path) -> None:
    try:
        checksums.verify_checksums(folder)
    except UserError as error:
        hint = f"make the folder again, or remove its {checksums.FILE} to load it all the same"
        raise UserError(f"{error}; {hint}") from None
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None


@contextlib.contextmanager
def orbax_errors(problem: str) -> Iterator[None]:
    """Makes one `UserError` of whatever the storage libraries raise, which is of no common type."""
    with quiet_storage():
        try:
            yield
        except Exception as error:
            raise UserError(f"{problem} ({first_line(error)})") from None


@contextlib.contextmanager
def quiet_storage() -> Iterator[None]:
    """Keeps the storage libraries from logging a traceback for every read that fails beside another."""
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except BaseException:
        gc.collect()  # forgotten futures report when they are collected; in a large process it takes a second
        raise
    finally:
        logger.setLevel(level)


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
