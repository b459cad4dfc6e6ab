"""How a run begins: its configuration file, and its place among other processes."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from moebius_jax.cluster import join_cluster
from moebius_jax.errors import UserError
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.overrides import apply_overrides


def load_config(path: Path, overrides: Sequence[str]) -> TrainConfig:
    """`get_config()` of a Python file, with overrides.

    Raises:
        UserError: no such file, it cannot be run, or an override is wrong.
    """
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.py"))) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such configuration" + (f"; there are {known}" if known else ""))
    if "=" in path.name:
        raise UserError(f"{path}: expected a configuration file before KEY=VALUE")
    if path.suffix != ".py":
        raise UserError(
            f"{path}: expected a Python file with get_config(), found {path.suffix or 'no suffix'}"
        )
    # Configurations derive from each other: `from configs.distill import …`.
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a Python file can do
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, TrainConfig):
        raise UserError(f"{path}: get_config() gave {type(config).__name__}, expected a TrainConfig")
    return apply_overrides(config, overrides)


def start_distributed(
    is_cluster: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes, if there are any.

    Raises:
        UserError: incomplete arguments, or no cluster to join.
    """
    given = [v is not None for v in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id go together")
    if is_cluster or any(given):
        join_cluster(coordinator, num_processes, process_id)
