"""Writing files and folders so that a reader never meets half of one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moebius_jax.errors import UserError


@contextlib.contextmanager
def replace_when_complete(dest: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a path beside `dest` to write to; renames it to `dest` when the block ends well.

    A block that raises leaves nothing behind and `dest` as it was. Works for files and for folders.

    Raises:
        UserError: `dest` exists and `overwrite` is False, or its folder cannot be written.
    """
    if dest.exists() and not overwrite:
        raise UserError(f"{dest}: exists already; pass --overwrite to replace it")
    # The suffix stays at the end: writers choose their format by it.
    partial = dest.with_name(f".{dest.stem}.partial-{os.getpid()}{dest.suffix}")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        if dest.exists() and not overwrite:  # another process was faster
            raise UserError(f"{dest}: was written by another process meanwhile")
        if dest.is_dir():
            old = dest.with_name(f".{dest.name}.old-{os.getpid()}")
            dest.rename(old)
            partial.rename(dest)
            _remove(old)
        else:
            partial.replace(dest)
    except OSError as error:
        raise UserError(f"{dest}: cannot be written ({error.strerror or error})") from error
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
