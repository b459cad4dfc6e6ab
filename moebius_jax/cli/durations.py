"""How long something took the last time, so that a wait can be announced; kept beside compiled programs."""

import contextlib
import json

from moebius_jax.cli.terminal import cache_folder
from moebius_jax.files import replace_when_complete

_FILE = "seconds.json"


def last_time(what: str) -> str:
    """What to add to an announcement: " (12 s the last time)", or nothing."""
    seconds = _read().get(what)
    return f" ({seconds:.0f} s the last time)" if isinstance(seconds, int | float) else ""


def remember(what: str, seconds: float) -> None:
    """Keeps the figure where that is possible; it is only a courtesy."""
    path = cache_folder() / _FILE
    with contextlib.suppress(Exception):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_when_complete(path, overwrite=True) as partial:
            partial.write_text(json.dumps({**_read(), what: round(seconds, 1)}, indent=1) + "\n")


def _read() -> dict[str, object]:
    try:
        found = json.loads((cache_folder() / _FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
