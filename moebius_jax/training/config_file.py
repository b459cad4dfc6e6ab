"""Configuration files: Python files with `get_config()`, found by path or by a shipped one's name."""

import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import cloudpickle

from moebius_jax.errors import UserError, first_line
from moebius_jax.extensions import run_file
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.overrides import apply_overrides

# Keys as they were called before, and what they are called now.
RENAMED = {
    "metric": "loss.perceptual.network",
    "perceptual.rescale_inputs": "loss.perceptual.rescale_inputs",
    "perceptual.augment": "loss.perceptual.augment",
    "guidance_scale": "sampling.guidance_scale",
    **{f"loss.{term}_scale": f"loss.{term}.scale" for term in ("coarse", "fine", "task", "perceptual")},
}


def load_config(name: str | Path, overrides: Sequence[str]) -> TrainConfig:
    """`get_config()` of a Python file, with overrides.

    Args:
        name: a path, or that of a shipped file (`configs/distill.py`, `distill`) where there is no such path;
            `PATH:ARGUMENT` calls `get_config(ARGUMENT)`.
        overrides: see `apply_overrides`.

    Raises:
        UserError: no such file, it cannot be run, or an override is wrong.
    """
    text, _, argument = str(name).partition(":")
    try:
        path = _find(Path(text))
    except OSError as error:  # a name no file can have
        raise UserError(f"{text}: {error.strerror or error}") from None
    where = f"{path}:{argument}" if argument else str(path)
    try:
        module = _module(path)
        config = module.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {first_line(error)}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever else a Python file can do, leaving the program among it
        raise UserError(f"{where}: {type(error).__name__}: {first_line(error)}") from None
    if not isinstance(config, TrainConfig):
        raise UserError(f"{where}: get_config() gave {type(config).__name__}, expected a TrainConfig")
    return apply_overrides(config, [_renamed(override) for override in overrides])


def shipped_configs() -> Path:
    """The folder of shipped configurations: in the package where it is installed, else in the checkout."""
    package = Path(__file__).parents[1]
    return next((p for p in (package / "configs", package.parent / "configs") if p.is_dir()), package)


def _find(path: Path) -> Path:
    if "=" in path.name:
        raise UserError(f"{path}: expected a configuration file before KEY=VALUE")
    if path.is_file():
        if path.suffix != ".py":
            raise UserError(
                f"{path}: expected a Python file with get_config(), found {path.suffix or 'no suffix'}"
            )
        return path
    if path.suffix == ".py" and os.path.lexists(path):
        raise UserError(f"{path}: expected a Python file with get_config(), found no ordinary file")
    shipped = shipped_configs()
    if path.parent.name in ("", "configs") and (shipped / path.name).with_suffix(".py").is_file():
        return (shipped / path.name).with_suffix(".py")
    known = path.parent if path.parent != Path() and any(path.parent.glob("*.py")) else shipped
    names = ", ".join(sorted(p.name for p in known.glob("*.py")))
    raise UserError(f"{path}: no such configuration; there are {names}")


def _module(path: Path) -> types.ModuleType:
    """The file as a module of the package `configs`, whose files may import each other and shipped ones."""
    package = types.ModuleType("configs")
    package.__path__ = [str(path.resolve().parent), str(shipped_configs())]
    for name in [n for n in sys.modules if n == "configs" or n.startswith("configs.")]:
        del sys.modules[name]  # of another folder
    sys.modules["configs"] = package
    cloudpickle.register_pickle_by_value(package)  # the files it imports, as `run_file` does with this one
    return run_file(path, f"configs.{path.stem}")


def _renamed(override: str) -> str:
    key, found, value = override.partition("=")
    return f"{RENAMED.get(key, key)}{found}{value}"
