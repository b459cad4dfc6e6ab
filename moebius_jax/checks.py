"""Checks that configurations share; messages begin with the field's name, callers put the path before it."""

from typing import Any


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Raises ValueError if one of these fields is below `least`; None counts as absent."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}; expected {least} or more")


def require_choice(config: Any, **choices: tuple[Any, ...]) -> None:
    """Raises ValueError if a field is none of its choices."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}; expected one of {', '.join(map(str, known))}"
            )
