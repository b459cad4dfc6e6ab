"""What the command-line programs share: errors as one line, progress bars, quiet libraries."""

import importlib.util
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moebius_jax.errors import UserError, how_to_install

_SIGPIPE = 141  # as a shell reports programs that a closed pipe ended
INTERRUPTED = 130  # likewise, by Ctrl-C
FAILED = 1  # exit status when anything asked for was not done


def run(program: Callable[[], int]) -> int:
    """Runs a program's body; what users can mend becomes a message on stderr and exit status 1."""
    quiet_libraries()
    try:
        status = program()
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.filename is None and not _takes_output():
            # Whoever read our output has seen enough; or it went to a disk that is full.
            if isinstance(error, BrokenPipeError):
                return _SIGPIPE
            print(f"error: the output cannot be written ({error.strerror})", file=sys.stderr)
            return FAILED
        what = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {what}{error.strerror or error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; finished files are kept, unfinished ones were not written", file=sys.stderr)
        return INTERRUPTED


def _takes_output() -> bool:
    """Whether the standard output can be written to; if not, it is closed for good, and quietly."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file, but something of a notebook's, say
        return True
    try:
        sys.stdout.flush()
        is_open = not _is_broken_pipe(output)
    except OSError:
        is_open = False
    if not is_open:
        # Python would try again when it ends, and say that it could not.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, output)
        os.close(null)
    return is_open


def _is_broken_pipe(output: int) -> bool:
    """Whether nobody can read it any more: what was not written once is not tried again by flushing."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def quiet_libraries() -> None:
    """Keeps routine chatter of libraries out of the terminal; errors still come through."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it announces every retry
    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised, and told in one line
    warnings.showwarning = _show_warning
    sys.unraisablehook = _show_unraisable


def progress(items: Iterable[Any], desc: str = "", **options: Any) -> Iterable[Any]:
    """`items` behind a progress bar on a terminal, silent elsewhere."""
    from tqdm import tqdm

    return tqdm(items, desc=desc, disable=not sys.stderr.isatty(), leave=False, **options)


def require_extra(extra: str, *modules: str) -> None:
    """Raises UserError if one of these modules is not installed; names the extra that brings them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; install the {extra} extra: {how_to_install(extra)}")


def exit_without_extra(extra: str, *modules: str) -> None:
    """`require_extra` for a program that imports them at once: says what is missing and ends it."""
    try:
        require_extra(extra, *modules)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def cache_folder() -> Path:
    """Where things are kept between runs: ~/.cache/moebius-jax unless the environment says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moebius-jax"


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `cache_folder()` unless jax's own variable says where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    # jax keeps what took a second or more; what a start compiles besides takes seconds together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    # When one read of a damaged checkpoint fails, the storage library's other threads find its loop closed.
    if not (
        isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)
    ):
        sys.__unraisablehook__(unraisable)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    # Deprecations inside libraries concern us, not the person at the terminal.
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
