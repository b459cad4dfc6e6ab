"""`SHA256SUMS`: what each file of a folder was when it was written; `sha256sum -c` reads it too."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moebius_jax.errors import UserError
from moebius_jax.files import replace_when_complete
from moebius_jax.weights.release_files import sha256

FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")


def write_checksums(folder: Path) -> None:
    """Leaves `SHA256SUMS` in a folder whose files are all written."""
    sums = _sums(folder, [name for name in _names(folder) if name != FILE])
    with replace_when_complete(folder / FILE, overwrite=True) as partial:
        partial.write_text("".join(f"{d}  {name}\n" for name, d in sums.items()), newline="\n")


def verify_checksums(folder: Path) -> None:
    """Reads what `SHA256SUMS` lists, several files at a time, and compares it. What else is there does not
    matter; a folder without a list, as version 0.1 wrote them, passes.

    Raises:
        UserError: a file is missing, no ordinary one or not what was written; it is named.
        OSError: it cannot be read.
    """
    listed = (folder / FILE).exists()
    written = _read(folder / FILE) if listed else dict.fromkeys(_names(folder), "")
    for name in written:
        if not (folder / name).is_file():  # reading a pipe or a device may never end
            found = "is no ordinary file" if (folder / name).exists() else f"missing, and listed in {FILE}"
            raise UserError(f"{folder / name}: {found}")
    if not listed:
        return
    for name, digest in _sums(folder, list(written)).items():
        if digest != written[name]:
            raise UserError(
                f"{folder / name}: not what was written, its SHA-256 is {digest[:12]}…, {FILE} has "
                f"{written[name][:12]}…"
            )


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    written = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path}: line {number} is no SHA-256 and a file's name")
        written[match[2]] = match[1]
    return written


def _sums(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashing does not hold the interpreter's lock
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


def _names(folder: Path) -> list[str]:
    """Of all files, relative to the folder, but for those apart."""
    paths = ((path, path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name.as_posix() for path, name in paths if not path.is_dir() and not _is_apart(name))


def _is_apart(path: Path) -> bool:
    """What file managers leave, and Orbax's record of times and versions, written last."""
    return path.name == "_CHECKPOINT_METADATA" or any(part.startswith(".") for part in path.parts)
