"""What the command-line programs share: errors as one line, progress bars, quiet libraries."""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moebius_jax.errors import UserError

FAILED = 1  # exit status when anything asked for was not done


def run(program: Callable[[], int]) -> int:
    """Runs a program's body; what users can mend becomes a message on stderr and exit status 1."""
    quiet_libraries()
    try:
        return program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except PermissionError as error:
        print(f"error: {error.filename}: not allowed ({error.strerror})", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; finished files are kept, unfinished ones were not written", file=sys.stderr)
        return 130


def quiet_libraries() -> None:
    """Keeps routine chatter of libraries out of the terminal; errors still come through."""
    # diffusers would load torch for classes we do not use, where torch is installed.
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it announces every retry
    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised, and told in one line
    warnings.showwarning = _show_warning
    sys.unraisablehook = _show_unraisable


def progress(items: Iterable[Any], desc: str = "", **options: Any) -> Iterable[Any]:
    """`items` behind a progress bar on a terminal, silent elsewhere."""
    from tqdm import tqdm

    return tqdm(items, desc=desc, disable=not sys.stderr.isatty(), leave=False, **options)


def require_training_extra() -> None:
    """Raises UserError if what only training needs is not installed."""
    missing = [n for n in ("optax", "grain", "clu", "tensorflow") if importlib.util.find_spec(n) is None]
    if "--aot" in sys.argv:  # only compiles: writes no events
        missing = [n for n in missing if n in ("optax", "grain")]
    if missing:
        raise UserError(
            f'{", ".join(missing)} missing; install the training extra: pip install -e ".[train]"'
        )


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in ~/.cache/moebius-jax unless the environment says where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(home / "moebius-jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    # When one read of a damaged checkpoint fails, the storage library's other threads find its loop closed.
    if not (
        isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)
    ):
        sys.__unraisablehook__(unraisable)


class CompileClock:
    """Measures the time jax spends tracing, lowering and compiling inside a `with` block.

    Compilation happens inside the first call of a function, so it cannot be timed from outside; jax
    reports its phases as time spans, which nest.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> "CompileClock":
        from jax import monitoring

        monitoring.register_event_time_span_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        from jax import monitoring

        monitoring.unregister_event_time_span_listener(self._listen)

    @property
    def seconds(self) -> float:
        """Length of the union of the spans."""
        total, until = 0.0, 0.0
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total

    def _listen(self, event: str, start: float, end: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((start, end))


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    # Deprecations inside libraries concern us, not the person at the terminal.
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
