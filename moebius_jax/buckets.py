"""Files and folders in buckets of Google's storage, gs://bucket/…: addresses, listings, copies, objects.

Folders are written by `moebius_jax.outbox`.
"""

import contextlib
import errno
import hashlib
import io
import logging
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moebius_jax import files
from moebius_jax.errors import UserError, first_line, how_to_install
from moebius_jax.files import AlreadyThere, partial_of, require_local

SCHEME = "gs://"
_AT_A_TIME = 8  # objects on their way


def is_bucket(path: str | Path) -> bool:
    """Whether it is an address in a bucket."""
    return str(path).startswith(SCHEME)


def location(text: str) -> Path:
    """A path of this machine, or of a bucket: etils.epath offers for these what pathlib does for those.

    Raises:
        ValueError: an address of another kind, of no bucket, or the library for buckets is missing.
    """
    if not is_bucket(text):
        return Path(require_local(text, f"or {SCHEME}BUCKET/PATH"))
    if not text.removeprefix(SCHEME).strip("/"):
        raise ValueError(f"expected {SCHEME}BUCKET/PATH")
    # The way that is tested; TensorFlow, which epath takes where it is installed, has another. It is asked
    # once: where a program has used epath before, that way is taken.
    os.environ["EPATH_USE_TF"] = "0"
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise ValueError(f"{SCHEME} needs gcsfs; install it: {how_to_install('gcs')}") from None
    for name in ("gcsfs", "google.auth"):  # what fails is raised, and told in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from etils import epath

    return epath.Path(text)


def joined(root: Path, name: str) -> Path:
    """What a name in a list of files means, the list's root being a folder here or in a bucket.

    Raises:
        UserError: an address of another kind.
    """
    try:
        if "://" in name or (is_bucket(root) and name.startswith("/")):
            return location(name)
        if is_bucket(root):
            # In a bucket, `..` would be a part of the name.
            return location(SCHEME + posixpath.normpath(f"{str(root).removeprefix(SCHEME)}/{name}"))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return root / name


@contextlib.contextmanager
def reaching(path: str | Path) -> Iterator[None]:
    """Makes one `UserError` of whatever the storage's libraries raise for a path in a bucket."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_bucket(path):
            raise
        raise UserError(f"{path}: cannot be reached ({first_line(error)})") from None


def forget_listings() -> None:
    """What was seen in buckets so far is asked for anew: other processes write there too."""
    storage().invalidate_cache()


def files_below(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Names relative to a folder in a bucket, with what tells another object of the same name.

    Raises:
        UserError: the bucket cannot be reached.
    """
    address = str(folder).rstrip("/")
    inside = address.removeprefix(SCHEME)
    with reaching(folder):
        forget_listings()
        # A listing that was kept would be a thousand bytes an object, for millions of them.
        found = storage().find(address, detail=True, update_cache=False)
    return {
        name.removeprefix(inside).lstrip("/"): (entry.get("size"), entry.get("md5Hash") or entry.get("etag"))
        for name, entry in sorted(found.items())
        if not name.endswith("/")
    }


def fetched(path: str | Path) -> Path:
    """A copy on this machine of a file or folder in a bucket; any other path as it is.

    Copies stay in `$HF_HOME/moebius-jax/buckets`, and are taken again while the bucket's listing is the same.

    Raises:
        UserError: there is nothing, a name in it leads elsewhere, or the bucket cannot be reached.
    """
    if not is_bucket(path):
        return Path(path)
    try:
        path = location(str(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    found = files_below(path)
    if not found:
        raise UserError(f"{path}: no such file or folder")
    require_inside(path, found)
    digest = hashlib.sha256(repr((str(path), found)).encode()).hexdigest()
    copy = _cache() / digest[:16] / path.name
    if not copy.exists():
        is_file = list(found) == [""]
        with contextlib.suppress(FileExistsError), _copying(copy, is_file) as partial, reaching(path):
            for_each(lambda name: copy_object(f"{path}/{name}".rstrip("/"), partial / name), found)
    return copy


def for_each(call: Callable[[str], object], names: Iterable[str]) -> None:
    """Calls for every name, eight at a time; when one fails, those that have not begun are left out."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in pool.map(call, names):
            pass


def copy_object(address: str, dest: Path) -> None:
    """Copies an object to a file of this machine, whose folder is made."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    storage().get_file(address, str(dest))


def require_inside(folder: Path, names: Iterable[str]) -> None:
    """Raises UserError if a name leads out of its folder."""
    if leading := [name for name in names if ".." in name.split("/")]:
        raise UserError(f"{folder}: holds {leading[0]!r}, which leads out of it")


def require_writable(folder: Path) -> None:
    """Raises UserError if nothing can be written into a folder, here or in a bucket."""
    if not is_bucket(folder):
        files.require_writable(folder)
        return
    mark = folder / partial_of(Path("writable")).name
    with reaching(folder):
        mark.write_text("")
        mark.unlink()


def write_object(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Writes an object, which has its name when all of it is there.

    Raises:
        AlreadyThere: it exists and may not be replaced.
        UserError: the bucket cannot be reached.
    """
    with reaching(path):
        try:
            storage().pipe_file(str(path), content, mode="overwrite" if overwrite else "create")
        except FileExistsError:
            raise AlreadyThere(path) from None


def move(source: Path, dest: Path) -> None:
    """Gives a folder another name; in a bucket object by object.

    Raises:
        UserError: the bucket cannot be reached.
        OSError: this machine's folder cannot be renamed.
    """
    if not is_bucket(source):
        source.rename(dest)
        return
    with reaching(source):
        forget_listings()
        storage().mv(str(source), str(dest), recursive=True)
        forget_listings()


class ArrayInBucket:
    """An .npy file in a bucket, of which rows are read one at a time.

    Args:
        path: of the file.

    Attributes:
        shape, dtype: of the array.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file.
        UserError: the bucket cannot be reached.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        with reaching(path):
            is_there = storage().exists(self._path)
        if not is_there:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path.name)
        head = io.BytesIO(self._read(0, 1 << 12))
        version = np.lib.format.read_magic(head)
        if version != (1, 0):
            raise ValueError(f"{path.name} is of version {version}; expected (1, 0)")
        self.shape, is_fortran, self.dtype = np.lib.format.read_array_header_1_0(head)
        if is_fortran or self.dtype.hasobject or not self.shape:
            raise ValueError(f"{path.name} holds no array of numbers, row by row")
        self._start = head.tell()
        self._row = self.dtype.itemsize * int(np.prod(self.shape[1:]))

    def __getitem__(self, i: int) -> np.ndarray:
        """A row."""
        start = self._start + range(self.shape[0])[i] * self._row
        return self._numbers(start, start + self._row).reshape(self.shape[1:])

    def whole(self) -> np.ndarray:
        """All of it, in memory."""
        end = self._start + self.shape[0] * self._row
        return self._numbers(self._start, end).reshape(self.shape)

    def _numbers(self, start: int, end: int) -> np.ndarray:
        content = self._read(start, end)
        if len(content) != end - start:
            raise UserError(f"{self._path}: {len(content)} bytes at {start}; expected {end - start}")
        return np.frombuffer(content, self.dtype)

    def _read(self, start: int, end: int) -> bytes:
        with reaching(self._path):
            return storage().cat_file(self._path, start=start, end=end)


def storage() -> Any:
    """The file system that epath uses, and with it Orbax: what one has written the other sees at once."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


def _cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "moebius-jax" / "buckets"


@contextlib.contextmanager
def _copying(copy: Path, is_file: bool) -> Iterator[Path]:
    """The name to copy to; another process may be faster, and then its copy stays."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=copy.parent) as folder:
        yield Path(folder) / copy.name
        if is_file:
            (Path(folder) / copy.name).replace(copy)
        else:
            with contextlib.suppress(OSError):
                (Path(folder) / copy.name).rename(copy)
