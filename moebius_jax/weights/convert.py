"""A released weight file into one of our folders and back: a strict bijection."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moebius_jax.errors import UserError
from moebius_jax.files import replace_when_complete, resolved
from moebius_jax.models.architecture import Architecture
from moebius_jax.models.norms import GROUPS
from moebius_jax.weights.detect import detect_architecture
from moebius_jax.weights.folder import load_numpy, read_config, save
from moebius_jax.weights.names import Slot, counters, expected_tensors
from moebius_jax.weights.release_files import ReleaseFile, open_release_file, sha256, write_torch
from moebius_jax.weights.tensors import abstract_tensors, statistics_of

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_WRITTEN_BY = b"moebius-jax"
BUFFERS = ("running_mean", "running_var")

Track = Callable[..., Any]  # tqdm-like: wraps an iterable, takes desc=


def convert_file(
    source: Path,
    dest: Path,
    *,
    dtype: str = "float32",
    base: Path | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    track: Track = lambda items, **_: items,
) -> Architecture:
    """Converts one released weight file into the folder `dest`.

    Args:
        source: a `.bin`, `.pth`, `.pt` or `.safetensors` file, or a safetensors index.
        dest: the folder to make (see `weights.folder`); written aside and renamed when complete.
        dtype: of the stored parameters: "float32", "float16" or "bfloat16". BatchNorm statistics stay fp32.
        base: checkpoint whose BatchNorm statistics complete an EMA file.
        overwrite: replace an existing `dest`.
        allow_nonfinite: take NaN and infinite weights, and variances below zero, as they are.
        track: wraps the loop over tensors, as tqdm does.

    Returns:
        The architecture read off the file.

    Raises:
        UserError: the file cannot be read or is not exactly one of the known networks.
    """
    if resolved(source).is_relative_to(resolved(dest)):
        raise UserError(f"{source}: lies in {dest}, which is to be made; choose another destination")
    opened = open_release_file(source)
    if base is not None:
        opened = _complete_with(opened, open_release_file(base))
    try:
        architecture = detect_architecture(opened.shapes(), str(source))
    except UserError:
        if not opened.problems:
            raise
        raise UserError(_report(f"{source}: is damaged", list(opened.problems))) from None
    expected, dtypes = expected_tensors(architecture), _stored_dtypes(architecture, dtype)
    require_bijection(opened, expected, architecture)

    tensors: dict[str, np.ndarray] = {}
    for name, slot in track(expected.items(), desc="reading"):
        array = _stored(name, slot, opened, dtypes[slot.path])
        if not allow_nonfinite:
            _require_sound(name, array, source)
        if slot.path in tensors and not np.array_equal(tensors[slot.path], array, equal_nan=True):
            raise UserError(f"{source}: {name} must repeat another tensor exactly and does not")
        tensors[slot.path] = array
    name = os.fsencode(source.name).decode(errors="replace")  # it may be no text
    origin = {
        "file": name,
        "variant": os.fsencode(source.absolute().parent.name).decode(errors="replace"),
        "sha256": sha256(source),
    }
    if (snapshot := source.absolute().parent.parent).parent.name == "snapshots":
        origin["commit"] = snapshot.name  # of the Hub's repository, as its cache is laid out
    if base is not None:
        origin["base"] = {"file": base.name, "sha256": sha256(base)}
    save(dest, architecture, tensors, dtype=dtype, source=origin, overwrite=overwrite)
    return architecture


def is_converted(source: Path, dest: Path, *, dtype: str) -> bool:
    """Whether `dest` is what converting `source` without a base makes; an earlier run may have done it."""
    try:
        found = read_config(dest)
    except UserError:
        return False
    return (
        found.dtype == dtype and "base" not in found.source and found.source.get("sha256") == sha256(source)
    )


def verify_folder(
    source: Path, dest: Path, *, base: Path | None = None, track: Track = lambda items, **_: items
) -> int:
    """Reads `dest` again and compares every tensor with `source`, bit for bit.

    Returns:
        The number of tensors compared.

    Raises:
        UserError: names every tensor that differs.
    """
    opened = open_release_file(source)
    if base is not None:
        opened = _complete_with(opened, open_release_file(base))
    config = read_config(dest)
    expected = expected_tensors(config.architecture)
    require_bijection(opened, expected, config.architecture)
    stored, dtypes = load_numpy(dest), _stored_dtypes(config.architecture, config.dtype)
    different = [
        name
        for name, slot in track(expected.items(), desc="verifying")
        if not _same_bits(stored[slot.path], _stored(name, slot, opened, dtypes[slot.path]))
    ]
    if different:
        raise UserError(
            _report(f"{dest}: {len(different)} tensors differ from {source}", [f"~ {n}" for n in different])
        )
    return len(expected)


def export_file(folder: Path, dest: Path, *, overwrite: bool = False) -> int:
    """Writes a converted folder as a `.safetensors` or `.bin` file with the release's names and layouts.

    BatchNorm counters, which carry nothing and are dropped by conversion, are written as zeros so that
    torch's strict loading accepts the file.

    Returns:
        The number of tensors written.

    Raises:
        UserError: not such a folder, not of the release's kind, or the file cannot be written; torch, which
            writes `.bin` files, is not installed.
    """
    write = {".safetensors": _write_safetensors, ".bin": _write_torch}.get(dest.suffix)
    if write is None:
        raise UserError(f"{dest}: exports are .safetensors or .bin files")
    if overwrite and dest.is_file() and not _is_ours(dest):
        raise UserError(
            f"{dest}: not replaced, it is no file we wrote (version 0.1 did not mark them); remove it, or "
            "choose another name"
        )
    config = read_config(folder)
    if (groups := getattr(config.architecture, "norm_groups", GROUPS)) != GROUPS:
        raise UserError(
            f"{folder}: its GroupNorms have {groups} groups; a released file does not say so, and would be "
            f"read as one of {GROUPS}"
        )
    if (kind := getattr(config.architecture, "prediction_type", "epsilon")) != "epsilon":
        raise UserError(
            f"{folder}: its prediction_type is {kind}; a released file does not say so, and would be read as "
            "one of epsilon"
        )
    expected = expected_tensors(config.architecture)
    stored = load_numpy(folder)
    released = {n: np.ascontiguousarray(s.layout.to_torch(stored[s.path])) for n, s in expected.items()}
    released |= {name: np.zeros((), np.int64) for name in counters(expected)}
    with replace_when_complete(dest, overwrite=overwrite) as partial:
        write(released, partial, dest)
    return len(released)


def _write_safetensors(tensors: dict[str, np.ndarray], partial: Path, dest: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, partial, metadata={"format": "pt", "written_by": _WRITTEN_BY.decode()})
    except SafetensorError as error:
        raise UserError(f"{dest}: cannot be written ({error})") from None


def _write_torch(tensors: dict[str, np.ndarray], partial: Path, dest: Path) -> None:
    write_torch(tensors, partial, mark=_WRITTEN_BY, shown=dest)


def _is_ours(file: Path) -> bool:
    """Whether it bears our mark: in a .safetensors file at the beginning, in a .bin at the end."""
    with file.open("rb") as opened:
        beginning = opened.read(2**10)
        opened.seek(-min(2**10, file.stat().st_size), os.SEEK_END)
        return _WRITTEN_BY in beginning + opened.read()


def require_bijection(source: ReleaseFile, expected: Mapping[str, Slot], architecture: Architecture) -> None:
    """Every expected tensor is in the file once, in its shape, and nothing else is.

    Raises:
        UserError: a report with one line for each missing (-), extra (+), misshapen (~) or duplicate (!)
            tensor.
    """
    found = source.shapes()
    missing = set(expected) - set(found)
    if source.is_ema and any(name.endswith(BUFFERS) for name in missing):
        raise UserError(
            f"{source.file}: an EMA file holds no BatchNorm statistics; name the checkpoint it was "
            "trained beside: --base CHECKPOINT"
        )
    extra = set(found) - set(expected) - counters(dict(expected))
    lines = [f"- {n} {list(expected[n].shape)} is missing" for n in sorted(missing)]
    lines += [f"+ {n} {list(found[n])} is no part of this network" for n in sorted(extra)]
    lines += [
        f"~ {n} {list(found[n])}, expected {list(slot.shape)}"
        for n, slot in expected.items()
        if n in found and found[n] != slot.shape
    ]
    lines += source.problems
    if lines:
        kind = architecture.describe()
        raise UserError(
            _report(f"{source.file}: {len(lines)} tensors do not fit the {kind} it looks like", lines)
        )


def _stored_dtypes(architecture: Architecture, dtype: str) -> dict[str, np.dtype]:
    """What each tensor is kept in, by our name, in a folder of this dtype."""
    statistics = statistics_of(architecture)
    return {
        path: np.dtype(np.float32 if path in statistics else DTYPES[dtype])
        for path in abstract_tensors(architecture)
    }


def _stored(name: str, slot: Slot, source: ReleaseFile, dtype: np.dtype) -> np.ndarray:
    """A released tensor as the folder keeps it."""
    try:
        array = source.tensors[name].load()
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"{source.file}: tensor {name} cannot be read ({error})") from None
    if array.dtype not in (*DTYPES.values(), np.float64):
        raise UserError(f"{source.file}: tensor {name} is of type {array.dtype}; expected floating point")
    # Half precision keeps its own bits when the folder is of the same type; otherwise one rounding.
    with np.errstate(over="ignore"):
        kept = array.astype(dtype, copy=False)
    if kept.dtype != array.dtype and not np.array_equal(np.isfinite(kept), np.isfinite(array)):
        raise UserError(f"{source.file}: tensor {name} has values too large for {kept.dtype}")
    return np.ascontiguousarray(slot.layout.to_jax(kept))


def _require_sound(name: str, array: np.ndarray, source: Path) -> None:
    """Raises UserError for numbers no trained network has."""
    hint = "; convert_weights.py --allow-nonfinite converts it all the same"
    if not (finite := np.isfinite(array)).all():
        raise UserError(f"{source}: tensor {name} has {np.sum(~finite)} NaN or infinite values{hint}")
    if name.endswith("running_var") and (lowest := array.min(initial=0)) < 0:
        raise UserError(f"{source}: tensor {name} has a variance of {lowest:.3g}{hint}")


def _complete_with(source: ReleaseFile, base: ReleaseFile) -> ReleaseFile:
    """An EMA source with the BatchNorm statistics of `base`."""
    if not source.is_ema:
        raise UserError(f"{source.file}: --base completes EMA files only, and this is none")
    buffers = {n: t for n, t in base.tensors.items() if n.endswith(BUFFERS)}
    return ReleaseFile(
        file=source.file,
        tensors={**buffers, **source.tensors},
        is_ema=True,
        problems=source.problems,
    )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _report(headline: str, lines: list[str]) -> str:
    return "\n".join([headline + ":", *(f"  {line}" for line in lines)])
