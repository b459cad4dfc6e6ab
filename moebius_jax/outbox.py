"""Folders of this machine that are sent to a bucket of Google's storage, gs://bucket/….

An object has its name only when all of it is there; of a folder of objects that is not so. What says what a
folder is (`config.json`, `latents.json`) is therefore sent last, and taken away first; what says whose
results come one by one (`run.json`) is sent first.
"""

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from moebius_jax import files
from moebius_jax.buckets import (
    copy_object,
    files_below,
    for_each,
    is_bucket,
    reaching,
    require_inside,
    require_writable,
    storage,
)
from moebius_jax.errors import UserError
from moebius_jax.files import AlreadyThere

_AT_ONCE = 1 << 28  # bytes of a file that are held in memory while it is sent
FIRST = ("run.json",)  # of a folder: results without it are nobody's
LAST = ("SHA256SUMS", "masks.json", "latents.json", "config.json", "pipeline.json")  # in this order


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
        require_inside(self._dest, names)
        halves = [f"{folder}/" for folder, mark in sets.items() if f"{folder}/{mark}" not in names]

        def take(name: str) -> None:
            copy_object(f"{self._dest}/{name}", self.folder / name)
            self._sent[name] = _state(self.folder / name)

        with reaching(self._dest):
            for_each(take, (name for name in names if not name.startswith(tuple(halves))))

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
            written = (p for p in self.folder.rglob("*") if not self._is_hidden(p) and p.is_file())
            for names in _ranked(path.relative_to(self.folder).as_posix() for path in written):
                for_each(self._send_new, names)

    def close(self) -> None:
        """Forgets what was written on this machine."""
        if is_bucket(self._dest):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _is_hidden(self, path: Path) -> bool:
        """What is being written has a name that begins with a dot, or is in such a folder."""
        return any(part[0] == "." for part in path.relative_to(self.folder).parts)

    def _send_new(self, name: str) -> None:
        now = _state(self.folder / name)
        if self._sent.get(name) != now:
            self._send(self.folder / name, f"{self._dest}/{name}")
            self._sent[name] = now

    def _send(self, path: Path, address: str) -> None:
        if path.name in FIRST:
            content = path.read_bytes()
            try:
                storage().pipe_file(address, content, mode="create")
            except FileExistsError:
                if storage().cat_file(address) != content:
                    raise AlreadyThere(address, "another process began with other settings") from None
        elif path.stat().st_size > _AT_ONCE:
            storage().put_file(str(path), address)
        else:  # as it is now: events are being added to their file meanwhile
            storage().pipe_file(address, path.read_bytes())

    def _remove(self, subfolder: str) -> None:
        below = f"{subfolder}/" if subfolder else ""
        for names in reversed(_ranked(files_below(self._dest / subfolder))):
            for_each(lambda name: storage().rm_file(f"{self._dest}/{below}{name}"), names)
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


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _ranked(names: Iterable[str]) -> list[list[str]]:
    """Of files: what may be sent at the same time, in the order in which it is sent."""

    def rank(name: str) -> int:
        last = name.rpartition("/")[2]
        return -1 if last in FIRST else LAST.index(last) + 1 if last in LAST else 0

    in_order = sorted(names, key=lambda name: (rank(name), name))
    return [list(group) for _, group in itertools.groupby(in_order, key=rank)]
