"""What a user of the command line should ever see: one kind of error, and pieces of its message."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the caller can put right: a wrong file, a wrong size, a missing download.

    The message is written for a terminal: it names the file or the argument, what was
    found, and what was expected. The command line prints it without a traceback and exits
    with status 1.
    """


class SharedError(UserError):
    """One that every process of a job raises at the same point: nobody has to be told of it."""


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The end of a message about an unknown word: what may be meant, or nothing."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def first_line(error: Exception | str) -> str:
    """What a library's exception says, short enough for a message; its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this package."""
    return f'pip install "moebius-jax[{extra}]" (in a checkout: pip install -e ".[{extra}]")'
