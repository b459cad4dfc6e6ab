"""Weight files as they are released: names, shapes, and each tensor when it is asked for."""

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moebius_jax.errors import UserError, first_line, how_to_install
from moebius_jax.schema import checked, read_json

SUFFIXES = (".bin", ".pth", ".pt", ".safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor in a file. `load` returns it in torch layout and in the dtype it is stored in."""

    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleaseFile:
    """An opened weight file.

    Attributes:
        file: path, for messages and for the record in config.json.
        tensors: by released name.
        is_ema: whether it holds the shadow parameters of the released trainer, without BatchNorm buffers.
        problems: what is wrong with the file beyond single tensors, such as a name that occurs twice.
    """

    file: Path
    tensors: Mapping[str, LazyTensor]
    is_ema: bool = False
    problems: tuple[str, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def open_release_file(path: Path) -> ReleaseFile:
    """Opens a `.bin`, `.pth`, `.pt` or `.safetensors` file, or an index of several safetensors shards.

    Raises:
        UserError: the file is missing, damaged, of another kind, or torch is needed and not installed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    _refuse_lfs_pointer(path)
    if path.name.endswith(".safetensors.index.json"):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return ReleaseFile(file=path, tensors=dict(_safetensors(path)))
    if path.suffix in SUFFIXES:
        return _open_torch(path)
    raise UserError(f"{path}: expected a {', '.join(SUFFIXES)} file, found {path.suffix or 'no suffix'}")


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _safetensors(path: Path) -> Iterable[tuple[str, LazyTensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None

    def tensor(name: str) -> LazyTensor:
        return LazyTensor(
            shape=tuple(file.get_slice(name).get_shape()), load=lambda: _owned(file.get_tensor(name))
        )

    return [(name, tensor(name)) for name in names]


@checked
class _Index:
    weight_map: dict[str, str]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def _open_shards(index: Path) -> ReleaseFile:
    """Several files with a list of which tensor is in which."""
    listed = read_json(index, _Index).weight_map
    tensors: dict[str, LazyTensor] = {}
    problems = []
    for file in sorted(set(listed.values())):
        if file != Path(file).name:
            raise UserError(f"{index}: lists {file!r}; expected names of files beside it")
        if not (index.parent / file).is_file():
            raise UserError(f"{index}: lists {file}, which is not in {index.parent}")
        for name, tensor in _safetensors(index.parent / file):
            if name in tensors:
                problems.append(f"! {name}: in more than one shard, again in {file}")
            tensors[name] = tensor
    problems += [
        f"- {name}: listed in {listed[name]}, which does not hold it"
        for name in listed.keys() - tensors.keys()
    ]
    return ReleaseFile(file=index, tensors=tensors, problems=tuple(problems))


def _open_torch(path: Path) -> ReleaseFile:
    torch = _import_torch(path, "reading")
    _refuse_unsound_archive(path)
    content = _torch_load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a state dict, found {type(content).__name__}")
    if "ema_buffers" in content:
        return _ema(path, content)
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(
            f"{path}: expected a state dict of tensors, but the entry {others[0]!r} is a "
            f"{type(content[others[0]]).__name__}; save the state dict by itself"
        )
    _refuse_more_than_stored(path, content)
    tensors = {str(name): _torch_tensor(value) for name, value in content.items()}
    return ReleaseFile(file=path, tensors=tensors)


def write_torch(tensors: Mapping[str, np.ndarray], file: Path, *, mark: bytes, shown: Path) -> None:
    """Writes a state dict as torch does, with a mark at the end of the file; errors speak of `shown`.

    Raises:
        UserError: torch is not installed, or the file cannot be written.
    """
    torch = _import_torch(shown, "writing")

    def tensor(value: np.ndarray) -> Any:
        value = value if value.flags.writeable else value.copy()
        if value.dtype == ml_dtypes.bfloat16:  # which NumPy and torch know by different names
            return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(value)

    try:
        torch.save({name: tensor(value) for name, value in tensors.items()}, file)
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = mark
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter on a full disk
        raise UserError(f"{shown}: cannot be written ({first_line(error)})") from None


def _import_torch(path: Path, doing: str) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: {doing} {path.suffix} files needs torch, which is not installed; "
            f"run: {how_to_install('convert')}; a .safetensors file needs no torch"
        ) from None
    return torch


def _refuse_unsound_archive(path: Path) -> None:
    """torch stores tensors as they are, and maps them without a look at their checksums. A compressed part
    may unpack to any size, and would be mapped as it is."""
    try:
        with zipfile.ZipFile(path) as file:
            compressed = [
                part.filename for part in file.infolist() if part.compress_type != zipfile.ZIP_STORED
            ]
            damaged = None if compressed else file.testzip()
    except Exception:  # no archive, or not one that can be read: torch says what it is
        return
    if compressed:
        reason = f"{compressed[0]} is compressed, which torch does not do"
    elif damaged:
        reason = f"{damaged} is damaged, its checksum is another"
    else:
        return
    raise UserError(f"{path}: not a readable torch checkpoint ({reason})")


def _torch_load(path: Path) -> Any:
    import torch

    try:
        # Mapping the file keeps memory at one tensor at a time; torch's oldest format cannot be mapped.
        mmap = path.open("rb").read(2) == b"PK"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # an unpickler raises whatever the bytes lead it to
        # torch's own text for files with other objects in them advises to run their code.
        reason = (
            "it holds more than tensors"
            if path.open("rb").read(2) == b"PK" and "nsupported" in str(error)
            else "damaged or of another kind"
        )
        raise UserError(f"{path}: not a readable torch checkpoint ({reason})") from None


def _refuse_more_than_stored(path: Path, tensors: Mapping[Any, Any]) -> None:
    """Raises UserError for tensors larger than what is stored of them: few bytes, repeated for gigabytes."""
    import torch

    found = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor) and not t.is_sparse}
    for name, tensor in found.items():
        try:
            stored = tensor.untyped_storage().nbytes()
        except Exception:  # of a kind without storage
            continue
        if stored < tensor.numel() * tensor.element_size():
            raise UserError(
                f"{path}: tensor {name} of {list(tensor.shape)} is stored in {stored} bytes; expected "
                "numbers of its own, save a contiguous copy"
            )
    # E-LatentLPIPS holds some tensors under two names.
    total = sum(t.numel() * t.element_size() for t in found.values())
    if total > 4 * (size := path.stat().st_size):
        raise UserError(f"{path}: a file of {size:,} bytes claims to hold {total:,} bytes of tensors")


def _torch_tensor(tensor: Any) -> LazyTensor:
    import torch

    def load() -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.detach().numpy()

    return LazyTensor(shape=tuple(tensor.shape), load=load)


def _ema(path: Path, content: dict[str, Any]) -> ReleaseFile:
    """The released trainer's EMA file: shadow tensors under names without dots, and a map to real names."""
    import torch

    buffers, names = content["ema_buffers"], content.get("ema_name_map")
    if not isinstance(buffers, dict) or not isinstance(names, dict):
        raise UserError(f"{path}: an EMA file must hold the dictionaries ema_buffers and ema_name_map")
    for name, short in names.items():
        if not (isinstance(name, str) and isinstance(short, str)):
            raise UserError(f"{path}: ema_name_map maps {name!r} to {short!r}; expected names")
    _refuse_more_than_stored(path, buffers)
    problems = []
    tensors = {}
    used = set()
    for name, short in names.items():
        if short in used:
            problems.append(f"! {name}: shares the EMA buffer {short} with another name")
        used.add(short)
        if not isinstance(buffers.get(short), torch.Tensor):
            problems.append(f"- {name}: the EMA buffer {short} is missing")
            continue
        tensors[name] = _torch_tensor(buffers[short])
    problems += [
        f"+ {short}: an EMA buffer without a name"
        for short in sorted(set(map(str, buffers)) - used - {"decay", "num_updates"})
    ]
    return ReleaseFile(file=path, tensors=tensors, is_ema=True, problems=tuple(problems))


def _refuse_lfs_pointer(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(40)
    if not start:
        raise UserError(f"{path}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: this is a Git LFS pointer, not the weights; run: git lfs pull")


def _owned(array: np.ndarray) -> np.ndarray:
    # Older safetensors return bfloat16 as raw 2-byte words.
    return array.view(ml_dtypes.bfloat16) if array.dtype.kind == "V" else array
