"""Python files of the user's: configurations, and extensions that add a mixer, a data set or a solver."""

import importlib.util
import sys
import types
import zlib
from pathlib import Path

import cloudpickle

from moebius_jax.errors import UserError


def run_file(path: Path, name: str) -> types.ModuleType:
    """A Python file as the module `name`; raises whatever it raises."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # What it defines, a data set say, is sent to grain's workers as it is: they could not import it.
    cloudpickle.register_pickle_by_value(module)
    spec.loader.exec_module(module)
    return module


def load_extension(path: Path) -> types.ModuleType:
    """Runs a file that registers something (docs/extending.md).

    Raises:
        UserError: there is no such file, or it fails.
    """
    try:
        if not path.is_file() or path.suffix != ".py":
            raise UserError(f"{path}: {'expected a Python file' if path.exists() else 'no such file'}")
    except OSError as error:  # a name no file can have
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        own = zlib.crc32(str(path.resolve()).encode())  # there may be a file of this name in another folder
        return run_file(path, f"extension_{path.stem}_{own:08x}")
    except (Exception, SystemExit) as error:  # whatever a Python file can do
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
