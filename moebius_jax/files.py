"""Writing files and folders so that a reader never meets half of one."""

import contextlib
import os
import platform
import re
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from moebius_jax.errors import UserError


class AlreadyThere(UserError):
    """A file or folder exists and may not be replaced."""

    def __init__(self, dest: Path, advice: str = "pass --overwrite (overwrite=True) to replace it") -> None:
        super().__init__(f"{dest}: exists already; {advice}")


@contextlib.contextmanager
def replace_when_complete(dest: Path, *, overwrite: bool, ours: Collection[str] = ()) -> Iterator[Path]:
    """Yields a path beside `dest` to write to; renames it to `dest` when the block ends well.

    A block that raises leaves nothing behind and `dest` as it was. Works for files and for folders; a link
    is followed. What killed processes left beside a folder is cleaned up; of files, `remove_remains` does it.

    Args:
        dest: what to write.
        overwrite: replace an existing `dest`.
        ours: of a folder, what one that may be replaced can hold; one with anything else in it is not ours.

    Raises:
        AlreadyThere: `dest` exists and may not be replaced.
        UserError: it cannot be written.
    """
    try:
        dest = resolved(dest)
        if ours:  # looking through a folder of many files for each of them would take long
            _recover(dest)
            remove_remains(dest.parent)
        _refuse_to_replace(dest, overwrite, ours)
        dest.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{dest}: cannot be written ({error.strerror or error})") from None
    partial = partial_of(dest)
    try:
        _remove(partial)
        yield partial
        _refuse_to_replace(dest, overwrite, ours)  # another process may have been faster
        if partial.is_file():  # some writers make files that only their owner can read
            partial.chmod(0o666 & ~_umask())
        if dest.is_dir():
            old = partial.with_suffix(".old")
            dest.rename(old)
            try:
                partial.rename(dest)
            except OSError:
                old.rename(dest)
                raise
            _remove(old)
        elif overwrite or partial.is_dir():
            partial.replace(dest)
        else:
            _place_new(partial, dest)
    except OSError as error:
        raise UserError(f"{dest}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)


def require_writable(folder: Path) -> None:
    """Makes a folder if need be, and sees that files can be written there.

    Raises:
        UserError: it is no folder, or they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror or error})") from None


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Makes a folder if need be and keeps it to this process while it lasts; from other machines where their
    shared file system has locks. A folder that was made here and left empty is gone afterwards.

    Raises:
        UserError: another process has it, or it cannot be written to.
    """
    is_new = not folder.exists()
    require_writable(folder)
    lock = folder / ".lock"
    with _locked(lock):
        try:
            yield
        finally:
            if is_new:
                with contextlib.suppress(OSError):
                    if [path.name for path in folder.iterdir()] == [lock.name]:
                        lock.unlink()
                        folder.rmdir()


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    try:
        file = lock.open("w")
    except OSError as error:
        raise UserError(f"{lock}: cannot be written ({error.strerror or error})") from None
    with file:
        taken = UserError(f"{lock.parent}: another process is using this folder (it holds {lock.name})")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        # Its last user may have taken the folder away after we opened it, and another may have made it anew.
        if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            raise taken
        yield


def partial_of(dest: Path) -> Path:
    """The hidden name beside `dest` under which this process writes it."""
    # Short whatever the name's length, and with its suffix: writers choose their format by it.
    return dest.with_name(f".partial-{_processes()}-{os.getpid()}-{_number(dest)}{dest.suffix}")


def remove_remains(folder: Path) -> None:
    """Removes what killed processes of this machine were writing into a folder.

    What `replace_when_complete` writes there for a process that still runs, or for one of another machine,
    is left alone; so is what such a process was about to replace (`.old`), of which there may be no other.
    """
    for partial in folder.glob(f".partial-{_processes()}-*"):
        process = partial.name.split("-")[2]
        if partial.suffix != ".old" and process.isdigit() and not _runs(int(process)):
            with contextlib.suppress(OSError):
                _remove(partial)


def resolved(path: Path) -> Path:
    """The path without links.

    Raises:
        UserError: it is a loop of links.
    """
    try:
        return path.resolve()
    except RuntimeError:  # Python 3.12 and before
        raise UserError(f"{path}: a loop of links") from None


def _number(dest: Path) -> str:
    return f"{zlib.crc32(os.fsencode(dest.name)):08x}"


def _recover(dest: Path) -> None:
    """Finishes what a process began that was killed between two renamings: the old folder is there no more
    under its name, or still there beside the new one."""
    for old in dest.parent.glob(f".partial-{_processes()}-*-{_number(dest)}.old"):
        process = old.name.split("-")[2]
        if process.isdigit() and not _runs(int(process)):
            with contextlib.suppress(OSError):  # another process may be doing the same
                if dest.exists():
                    _remove(old)
                else:
                    old.rename(dest)


def _processes() -> str:
    """Whose process numbers are meant: this machine's, or on Linux this container's."""
    names = [platform.node()]
    with contextlib.suppress(OSError):
        names.append(os.readlink("/proc/self/ns/pid"))
    with contextlib.suppress(OSError):  # machines of one name may share a disk
        names.append(Path("/etc/machine-id").read_text())
    return f"{zlib.crc32(' '.join(names).encode()):08x}"


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is someone else's
        pass
    return True


def _refuse_to_replace(dest: Path, overwrite: bool, ours: Collection[str]) -> None:
    if not dest.exists():
        return
    if not overwrite:
        raise AlreadyThere(dest)
    if dest.is_dir() != bool(ours) or not (dest.is_dir() or dest.is_file()):
        kind = "a folder" if dest.is_dir() else "a file" if dest.is_file() else "no ordinary file"
        raise UserError(f"{dest}: not replaced, it is {kind}; expected {'a folder' if ours else 'a file'}")
    if dest.is_dir():
        require_nothing_else(dest, {p.name for p in dest.iterdir()}, ours)


def require_nothing_else(dest: Path, names: Collection[str], ours: Collection[str]) -> None:
    """Raises UserError if a folder that is to be replaced holds other names than ours."""
    if foreign := sorted(set(names) - set(ours)):
        raise UserError(
            f"{dest}: not replaced, it holds other things than we write ({', '.join(foreign[:3])})"
        )


def _place_new(partial: Path, dest: Path) -> None:
    """Gives a file its name, and never another process's that got there first."""
    try:
        os.link(partial, dest)
    except FileExistsError:
        _refuse_to_replace(dest, False, ())
    except OSError:  # a file system without links
        partial.replace(dest)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_local(path: str, alternative: str = "") -> str:
    """`path`; raises ValueError if it is an address.

    As a path `s3://bucket/run` would be the folder `s3:` here.

    Args:
        path: to be looked at.
        alternative: what else may stand in its place, for the message.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path):
        expected = " ".join(filter(None, ("expected a path of this machine", alternative)))
        raise ValueError(f"{expected}; what is elsewhere is reached through a mount (gcsfuse, …)")
    return path
