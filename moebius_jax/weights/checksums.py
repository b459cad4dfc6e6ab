"""`SHA256SUMS`: what each file of a folder was when it was written; `sha256sum -c` reads it too."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moebius_jax.errors import UserError
from moebius_jax.files import replace_when_complete

FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")


def write_checksums(folder: Path) -> None:
    """Leaves `SHA256SUMS` in a folder whose files are all written."""
    sums = _sums(folder)
    with replace_when_complete(folder / FILE, overwrite=True) as partial:
        partial.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def verify_checksums(folder: Path) -> None:
    """Reads all files of a folder, several at a time, and compares them with its `SHA256SUMS`.

    A folder without one, as version 0.1 wrote them, passes.

    Raises:
        UserError: a file is missing, was added, is no ordinary one or not what was written; it is named.
    """
    for name in _names(folder):
        if not (folder / name).is_file():  # reading a pipe or a device may never end
            raise UserError(f"{folder / name}: is no ordinary file")
    if not (folder / FILE).exists():
        return
    written = _read(folder / FILE)
    try:
        found = _sums(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    if missing := sorted(set(written) - set(found)):
        raise UserError(f"{folder / missing[0]}: missing, and listed in {FILE}")
    if added := sorted(set(found) - set(written)):
        raise UserError(f"{folder / added[0]}: not listed in {FILE}")
    if changed := sorted(name for name in written if written[name] != found[name]):
        name = changed[0]
        raise UserError(
            f"{folder / name}: not what was written, its SHA-256 is {found[name][:12]}…, {FILE} has "
            f"{written[name][:12]}…"
        )


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    written = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path}: line {number} is no SHA-256 and a file's name")
        written[match[2]] = match[1]
    return written


def _sums(folder: Path) -> dict[str, str]:
    names = [name for name in _names(folder) if name != FILE]
    with ThreadPoolExecutor() as pool:  # hashing does not hold the interpreter's lock
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def _names(folder: Path) -> list[str]:
    """Of all files, relative to the folder, but for those apart."""
    paths = ((path, path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name.as_posix() for path, name in paths if not path.is_dir() and not _is_apart(name))


def _is_apart(path: Path) -> bool:
    """What file managers leave, and Orbax's record of times and versions, written last."""
    return path.name == "_CHECKPOINT_METADATA" or any(part.startswith(".") for part in path.parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
