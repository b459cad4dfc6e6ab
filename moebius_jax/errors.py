"""The one exception a user of the command line should ever see."""


class UserError(Exception):
    """Something the caller can put right: a wrong file, a wrong size, a missing download.

    The message is written for a terminal: it names the file or the argument, what was
    found, and what was expected. The command line prints it without a traceback and exits
    with status 1.
    """
