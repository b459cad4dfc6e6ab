"""`key=value` on the command line, for any tree of frozen dataclasses, and its inverse for the record."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from moebius_jax.errors import UserError, did_you_mean
from moebius_jax.schema import parse_text

Config = TypeVar("Config")


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with fields changed: `optimizer.learning_rate=1e-4`, `loss.terms=task,fine`, `init=none`.

    All are applied before anything is checked, so fields that depend on each other may change together.

    Raises:
        UserError: no "=", an unknown key (the nearest one is named), a value of another type, or one that
            the configuration refuses.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        key, found, text = override.partition("=")
        if not found:
            raise UserError(f"{override}: expected KEY=VALUE, such as batch_size=32")
        node, branch = config, changes
        *parents, last = key.split(".")
        for parent in parents:
            node = _child(node, parent, key)
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise UserError(f"{key}: {parent} itself is set as well; set one or the other")
        hint = _hints(node, key).get(last)
        if hint is None:
            raise _unknown(key, config)
        if dataclasses.is_dataclass(getattr(node, last)) and str not in _options(hint):
            raise UserError(
                f"{key}: is a group; set one of its fields, {key}.{_fields(getattr(node, last))[0]}=…"
            )
        if isinstance(branch.get(last), dict):
            raise UserError(f"{key}: its fields are set as well; set one or the other")
        branch[last] = _parse(text, hint, key)
    return _rebuild(config, changes)


def describe(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted key, as JSON-ready values."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= describe(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = [_plain(v) for v in value] if isinstance(value, tuple) else value
    return flat


def _plain(item: Any) -> Any:
    return repr(item) if dataclasses.is_dataclass(item) else item


def _rebuild(config: Any, changes: dict[str, Any], path: str = "") -> Any:
    """`config` with changes; an error names the whole path of its field."""
    new = {
        name: _rebuild(getattr(config, name), value, f"{path}{name}.") if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    try:
        return dataclasses.replace(config, **new)
    except ValueError as error:
        raise UserError(f"{path}{error}") from None


def _child(node: Any, name: str, key: str) -> Any:
    child = getattr(node, name, None)
    if not dataclasses.is_dataclass(child):
        raise UserError(f"{key}: unknown key; {name!r} is no group of fields ({', '.join(_fields(node))})")
    return child


def _hints(node: Any, key: str) -> dict[str, Any]:
    if not dataclasses.is_dataclass(node):
        raise UserError(f"{key}: unknown key")
    hints = typing.get_type_hints(type(node), include_extras=True)
    return {name: hints[name] for name in _fields(node)}


def _fields(node: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(node)]


def _unknown(key: str, config: Any) -> UserError:
    return UserError(f"{key}: unknown key{did_you_mean(key, describe(config), cutoff=0.5)}")


def _options(hint: Any) -> tuple[Any, ...]:
    """The kinds a field can be, without a union and without what `Annotated` adds."""
    if typing.get_origin(hint) is Annotated:
        return _options(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for option in typing.get_args(hint) for kind in _options(option))
    return (hint,)


def _parse(text: str, hint: Any, key: str) -> Any:
    options = _options(hint)
    if type(None) in options and text.lower() in ("none", "null", ""):
        return None
    value: Any = text
    is_name = any(
        typing.get_origin(option) is Literal and text in typing.get_args(option) for option in options
    )
    if not is_name and any(typing.get_origin(option) is tuple for option in options):
        value = tuple(part.strip() for part in text.split(",") if part.strip())
    return parse_text(value, hint, key)
