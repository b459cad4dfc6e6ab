"""Folders in buckets of Google's storage (gs://bucket/…): read where they lie, written from this machine.

An object has its name only when all of it is there; of a folder of objects that is not so. What says what a
folder is (`config.json`, `latents.json`) is therefore sent last, and taken away first; what says whose
results come one by one (`run.json`) is sent first.
"""

import contextlib
import errno
import hashlib
import io
import logging
import os
import posixpath
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moebius_jax import files
from moebius_jax.errors import UserError, first_line
from moebius_jax.files import AlreadyThere, partial_of, require_local

SCHEME = "gs://"
_AT_ONCE = 1 << 28  # bytes of a file that are held in memory while it is sent
FIRST = ("run.json",)  # of a folder: results without it are nobody's
LAST = ("SHA256SUMS", "masks.json", "latents.json", "config.json", "pipeline.json")  # in this order


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
        raise ValueError(f'{SCHEME} needs gcsfs; install it: pip install "moebius-jax[gcs]"') from None
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
    _storage().invalidate_cache()


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
        found = _storage().find(address, detail=True, update_cache=False)
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
    _require_inside(path, found)
    digest = hashlib.sha256(repr((str(path), found)).encode()).hexdigest()
    copy = _cache() / digest[:16] / path.name
    if not copy.exists():
        is_file = list(found) == [""]
        with contextlib.suppress(FileExistsError), _copying(copy, is_file) as partial, reaching(path):
            for name in found:
                dest = partial / name if name else partial
                dest.parent.mkdir(parents=True, exist_ok=True)
                _storage().get_file(str(path / name if name else path), str(dest))
    return copy


def _require_inside(folder: Path, names: Iterable[str]) -> None:
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
            _storage().pipe_file(str(path), content, mode="overwrite" if overwrite else "create")
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
        _storage().mv(str(source), str(dest), recursive=True)
        forget_listings()


class Outbox:
    """What a run writes, for a folder that may be in a bucket.

    Args:
        dest: the run's folder.

    Attributes:
        folder: where to write: `dest`, or for a bucket a folder of this machine until `send`.
    """

    def __init__(self, dest: Path) -> None:
        self._dest, self._sent = dest, {}
        self.folder = Path(tempfile.mkdtemp(prefix="moebius-")) if is_bucket(dest) else dest

    def take(self, sets: Mapping[str, str]) -> None:
        """Takes what is in the bucket already; it is sent again only where it changes.

        Args:
            sets: subfolders that are nothing without a file of theirs, which is sent last: what was
                interrupted on its way there is not taken.

        Raises:
            UserError: the bucket cannot be reached, or holds a file in the folder's place, or a name that
                leads elsewhere.
        """
        if not is_bucket(self._dest):
            return
        names = files_below(self._dest)
        if "" in names:
            raise UserError(f"{self._dest}: is a file, expected a folder")
        _require_inside(self._dest, names)
        halves = [f"{folder}/" for folder, mark in sets.items() if f"{folder}/{mark}" not in names]
        with reaching(self._dest):
            for name in names:
                if name.startswith(tuple(halves)):
                    continue
                dest = self.folder / name
                dest.parent.mkdir(parents=True, exist_ok=True)
                _storage().get_file(f"{self._dest}/{name}", str(dest))
                self._sent[name] = _state(dest)

    def send(self, *, anew: str | None = None) -> None:
        """Sends what has changed since it was last sent. Where nothing is in a bucket, it does nothing.

        Args:
            anew: a subfolder, "" for all; what was in its place before is removed first.

        Raises:
            UserError: it cannot be written.
        """
        if not is_bucket(self._dest):
            return
        with reaching(self._dest):
            if anew is not None:
                self._remove(anew)
            written = (path for path in self.folder.rglob("*") if not self._is_hidden(path))
            for path in sorted(filter(Path.is_file, written), key=lambda path: (_rank(path.name), path)):
                name, now = path.relative_to(self.folder).as_posix(), _state(path)
                if self._sent.get(name) != now:
                    self._send(path, f"{self._dest}/{name}")
                    self._sent[name] = now

    def close(self) -> None:
        """Forgets what was written on this machine."""
        if is_bucket(self._dest):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _is_hidden(self, path: Path) -> bool:
        """What is being written has a name that begins with a dot, or is in such a folder."""
        return any(part[0] == "." for part in path.relative_to(self.folder).parts)

    def _send(self, path: Path, address: str) -> None:
        if path.name in FIRST:
            content = path.read_bytes()
            try:
                _storage().pipe_file(address, content, mode="create")
            except FileExistsError:
                if _storage().cat_file(address) != content:
                    raise AlreadyThere(address, "another process began with other settings") from None
        elif path.stat().st_size > _AT_ONCE:
            _storage().put_file(str(path), address)
        else:  # as it is now: events are being added to their file meanwhile
            _storage().pipe_file(address, path.read_bytes())

    def _remove(self, subfolder: str) -> None:
        below = f"{subfolder}/" if subfolder else ""
        names = files_below(self._dest / subfolder)
        for name in sorted(names, key=lambda name: (-_rank(name.rpartition("/")[2]), name)):
            _storage().rm_file(f"{self._dest}/{below}{name}")
        self._sent = {k: v for k, v in self._sent.items() if not k.startswith(below)}


@contextlib.contextmanager
def folder_for(dest: Path, *, overwrite: bool, ours: Collection[str]) -> Iterator[Path]:
    """Yields a folder of this machine to fill, which becomes `dest`, here or in a bucket, at the end.

    Arguments and errors: see `files.replace_when_complete`; but in a bucket the old is taken away before the
    new is sent. What was interrupted on its way is replaced; what cannot be sent stays here.
    """
    if not is_bucket(dest):
        with files.replace_when_complete(dest, overwrite=overwrite, ours=ours) as partial:
            partial.mkdir()
            yield partial
        return
    _require_replaceable(dest, overwrite, ours)
    require_writable(dest)
    outbox = Outbox(dest)
    try:
        yield outbox.folder
    except BaseException:
        outbox.close()
        raise
    try:
        _require_replaceable(dest, overwrite, ours)  # another process may have been faster
        outbox.send(anew="")
    except UserError as error:
        raise UserError(f"{error}; what was to be sent is in {outbox.folder}") from None
    outbox.close()


def _require_replaceable(dest: Path, overwrite: bool, ours: Collection[str]) -> None:
    found = files_below(dest)
    if set(LAST) & set(found) and not overwrite:
        raise AlreadyThere(dest)
    files.require_nothing_else(dest, found, ours)


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
            is_there = _storage().exists(self._path)
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
            return _storage().cat_file(self._path, start=start, end=end)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _rank(name: str) -> int:
    return -1 if name in FIRST else LAST.index(name) + 1 if name in LAST else 0


def _storage() -> Any:
    """The one that epath uses, and with it Orbax: what one has written the other sees at once."""
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
