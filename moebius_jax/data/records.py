"""What there is to train on: the release's JSON-lines file, or every image of a folder.

Millions of samples are held by every process and by each of its workers, so of a sample there are nine bytes
in memory: where its line begins, and its task. Lines are checked when they are counted, and read again when a
sample is drawn.
"""

import array
import ast
import dataclasses
import difflib
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8
from pydantic_core import from_json

from moebius_jax.buckets import fetched, files_below, is_bucket, joined, reaching
from moebius_jax.errors import UserError, first_line
from moebius_jax.imaging.picture import SUFFIXES

Task = Literal["background", "foreground"]
_KEYS = ("image", "prompt", "mask")
_LONGEST_NAME = 4096
_LONGEST_LINE = 1 << 20
_MARK = b"\xef\xbb\xbf"  # that some editors begin a file with
TASKS: tuple[Task, ...] = ("background", "foreground")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One sample.

    Attributes:
        image: file.
        task: "background" samples are repainted as background; a "foreground" one's mask covers an object.
        mask: file, white = hole; None for random masks.
    """

    image: Path
    task: Task = "background"
    mask: Path | None = None


class Records(Sequence[Record]):
    """The samples of a folder or a file, by number; see `read_records`."""

    def foreground(self) -> Int[np.ndarray, " m"]:
        """Numbers of the foreground samples."""
        return np.empty(0, np.int64)


class FolderRecords(Records):
    """All images below a folder, by name.

    Raises:
        UserError: there are none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        images = sorted(
            path
            for path in map(Path, _files_below(folder))
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        if not images:
            raise UserError(f"{folder}: no images ({', '.join(SUFFIXES)}) in this folder")
        names = [os.fsencode(image) for image in images]
        self._ends = np.cumsum([len(name) for name in names])
        self._names = b"".join(names)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> Record:
        i = range(len(self))[i]
        name = self._names[self._ends[i - 1] if i else 0 : self._ends[i]]
        return Record(image=self._folder / os.fsdecode(name))


def _files_below(folder: Path) -> Iterable[str]:
    """Relative to the folder."""
    if is_bucket(folder):
        return files_below(folder)
    walk = os.walk(folder)
    return (os.path.relpath(os.path.join(below, name), folder) for below, _, names in walk for name in names)


class AnnotationRecords(Records):
    """The lines of a JSON-lines file.

    Args:
        path: of the file.
        root: what relative paths in it start from; its folder by default.

    Raises:
        UserError: it cannot be read, or holds a line that cannot be understood (names the first), or none.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self._path, self._root = path, root or path.parent
        self._copy = fetched(path)
        starts, tasks, end = array.array("q"), bytearray(), 0
        try:
            with self._copy.open("rb") as file:
                self._identity = _identity(file.fileno())
                for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 4), b""), 1):
                    start, end = end, end + len(line)
                    line = line.removeprefix(_MARK)  # noqa: PLW2901 (of the first alone)
                    if line.strip():
                        fields = _fields(line, f"{path}:", number)
                        starts.append(start)
                        tasks.append(TASKS.index(fields[1]))
        except FileNotFoundError:
            raise UserError(f"{path}: no such folder of images, or JSON-lines file") from None
        except OSError as error:
            raise UserError(f"{path}: unreadable ({error})") from None
        if not starts:
            raise UserError(f"{path}: holds no samples")
        self._starts = np.frombuffer(starts, np.int64)
        self._tasks: UInt8[np.ndarray, " n"] = np.frombuffer(tasks, np.uint8)
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Record:
        i = range(len(self))[i]
        try:
            image, task, mask = _fields(self._line(i), f"{self._path}, sample ", i)
        except OSError as error:
            raise UserError(f"{self._path}: unreadable ({error})") from None
        return Record(
            image=joined(self._root, image), task=task, mask=joined(self._root, mask) if mask else None
        )

    def foreground(self) -> Int[np.ndarray, " m"]:
        return np.flatnonzero(self._tasks == TASKS.index("foreground"))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # another process opens it anew

    def _line(self, i: int) -> bytes:
        if self._file is None:
            self._file = os.open(self._copy, os.O_RDONLY)
            if _identity(self._file) != self._identity:
                os.close(self._file)
                self._file = None
                raise UserError(f"{self._path}: is another file than when it was first read")
        start = int(self._starts[i])
        end = int(self._starts[i + 1]) if i + 1 < len(self) else start + _LONGEST_LINE + 4
        # Not through a map of the file: one that is cut short meanwhile would end the process.
        return os.pread(self._file, end - start, start).removeprefix(_MARK).split(b"\n", 1)[0]


class ForegroundMasks(Sequence[Path]):
    """The masks of the foreground samples.

    Args:
        records: that have some.
        where: they are from, for the message.

    Raises:
        UserError: there are none.
    """

    def __init__(self, records: Records, where: Path) -> None:
        self._records, self._numbers = records, records.foreground()
        if not len(self._numbers):
            raise UserError(
                f"{where}: has no foreground samples, whose masks are wanted; data.augment.foreground_masks "
                "names others, or none"
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Path:
        mask = self._records[int(self._numbers[i])].mask
        if mask is None:
            raise UserError("a foreground sample has lost its mask: its file was changed")
        return mask


class ImagePaths(Sequence[Path]):
    """The samples' images."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Path:
        return self._records[i].image


def read_records(path: Path, root: Path | None = None) -> Records:
    """The samples of a folder (all images below it, by name) or of a JSON-lines file.

    Args:
        path: folder or file.
        root: what relative paths in the file start from; the file's folder by default.

    Raises:
        UserError: nothing there, or a line that cannot be understood.
    """
    with reaching(path):
        if path.is_dir():
            return FolderRecords(path)
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: no ordinary file or folder")
    if path.suffix.lower() in SUFFIXES:
        raise UserError(f"{path}: an image; expected a folder of images, or a JSON-lines file")
    return AnnotationRecords(path, root)


def _fields(line: bytes, where: str, number: int) -> tuple[str, Task, str | None]:
    """Image, task and mask of a line; `where` and `number` tell its place, for messages."""
    value = _parsed(line, where, number)
    if isinstance(value, list) and len(value) == 2:  # the release's [key, object] lines
        value = value[1]
    if not isinstance(value, dict) or not isinstance(value.get("image"), str):
        found = line[:80].decode(errors="replace").strip()
        raise UserError(
            f'{where}{number}: expected {{"image": PATH, "prompt": …, "mask": PATH}}, found {found}'
        )
    for key in value:
        if not isinstance(key, str):  # Python's notation would allow it
            raise UserError(f"{where}{number}: the field {_short(key)} has no name")
        if key not in _KEYS and (meant := _meant(key)) and meant not in value:
            raise UserError(f"{where}{number}: unknown field {key[:80]!r}; did you mean {meant}?")
    image, task, mask = value["image"], value.get("prompt", "background"), value.get("mask")
    if task not in TASKS:
        raise UserError(f'{where}{number}: prompt is {_short(task)}; expected "background" or "foreground"')
    if mask is not None and not isinstance(mask, str):
        raise UserError(f"{where}{number}: mask is {_short(mask)}; expected a path")
    for name in (image, mask or ""):
        if len(name) > _LONGEST_NAME:
            raise UserError(
                f"{where}{number}: a path of {len(name):,} characters; expected {_LONGEST_NAME} or fewer"
            )
    if task == "foreground" and not mask:
        raise UserError(f"{where}{number}: a foreground sample needs a mask")
    return image, task, mask or None


def _parsed(line: bytes, where: str, number: int) -> Any:
    if len(line) > _LONGEST_LINE:
        raise UserError(
            f"{where}{number}: a line of {len(line):,} bytes; expected {_LONGEST_LINE:,} or fewer"
        )
    try:
        return from_json(line)
    except ValueError as error:
        try:  # the release reads Python's own notation too
            return ast.literal_eval(line.decode().strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise UserError(f"{where}{number}: not JSON ({first_line(error)})") from None


@functools.lru_cache(1024)
def _meant(key: str) -> str | None:
    """The field somebody may have meant; others' own fields are no concern of ours."""
    return next(iter(difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.7)), None)


def _identity(file: int) -> tuple[int, ...]:
    """What another file at the same place would hardly have; mounted buckets renumber their inodes."""
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
