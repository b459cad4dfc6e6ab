"""The one exception a user of the command line should ever see."""


class UserError(ValueError):
    """Something the caller can put right: a wrong file, a wrong size, a missing download.

    The message is written for a terminal: it names the file or the argument, what was
    found, and what was expected. The command line prints it without a traceback and exits
    with status 1.
    """


class SharedError(UserError):
    """One that every process of a job raises at the same point: nobody has to be told of it."""


def first_line(error: Exception | str) -> str:
    """What a library's exception says, short enough for a message; its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
