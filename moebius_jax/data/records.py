"""What there is to train on: the release's JSON-lines file, or every image of a folder."""

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Literal

from moebius_jax.errors import UserError, first_line
from moebius_jax.imaging.picture import SUFFIXES

Task = Literal["background", "foreground"]
_KEYS = ("image", "prompt", "mask")
_LONGEST_NAME = 4096
TASKS: tuple[Task, ...] = ("background", "foreground")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of an annotation file.

    Attributes:
        image: file.
        task: "background" samples are repainted as background; a "foreground" one's mask covers an object.
        mask: file, white = hole; None for random masks.
    """

    image: Path
    task: Task = "background"
    mask: Path | None = None


def read_records(path: Path, root: Path | None = None) -> list[Record]:
    """The samples of a folder (all images below it, by name) or of a JSON-lines file.

    Args:
        path: folder or file.
        root: what relative paths in the file start from; the file's folder by default.

    Raises:
        UserError: nothing there, or a line that cannot be understood.
    """
    if path.is_dir():
        images = sorted(
            Path(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        )
        if not images:
            raise UserError(f"{path}: no images ({', '.join(SUFFIXES)}) in this folder")
        return [Record(image=image) for image in images]
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: no ordinary file or folder")
        if path.suffix.lower() in SUFFIXES:
            raise UserError(f"{path}: an image; expected a folder of images, or a JSON-lines file")
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() splits within strings too
    except FileNotFoundError:
        raise UserError(f"{path}: no such folder of images, or JSON-lines file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable ({error})") from None
    root = root or path.parent
    records = [_record(line, f"{path}:{i}", root) for i, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise UserError(f"{path}: holds no samples")
    return records


def _record(line: str, where: str, root: Path) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)})") from None
    if isinstance(value, list) and len(value) == 2:  # the release's [key, object] lines
        value = value[1]
    if not isinstance(value, dict) or not isinstance(value.get("image"), str):
        raise UserError(f'{where}: expected {{"image": PATH, "prompt": …, "mask": PATH}}, found {line[:80]}')
    for key in value:
        meant = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.7)
        if meant and meant[0] not in value:  # fields of others' own are no concern of ours
            raise UserError(f"{where}: unknown field {key[:80]!r}; did you mean {meant[0]}?")
    task, mask = value.get("prompt", "background"), value.get("mask")
    if task not in TASKS:
        raise UserError(f'{where}: prompt is {_short(task)}; expected "background" or "foreground"')
    if mask is not None and not isinstance(mask, str):
        raise UserError(f"{where}: mask is {_short(mask)}; expected a path")
    for name in (value["image"], mask or ""):
        if len(name) > _LONGEST_NAME:
            raise UserError(f"{where}: a path of {len(name):,} characters; expected {_LONGEST_NAME} or fewer")
    if task == "foreground" and not mask:
        raise UserError(f"{where}: a foreground sample needs a mask")
    return Record(image=root / value["image"], task=task, mask=root / mask if mask else None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
