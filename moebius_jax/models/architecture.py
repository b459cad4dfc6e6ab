"""What every network's configuration can do: be stored as JSON, be read again, be named in a message."""

import dataclasses
from typing import Any, ClassVar, Self

EXECUTION = {"execution": True}  # marks fields that choose how to compute, not what


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and switches of a network, without its weights.

    Attributes:
        NOUN: what such a network is called.
    """

    NOUN: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; execution choices are left out."""
        return {name: _as_lists(getattr(self, name)) for name in self._stored()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown or missing field, or a value that is out of range.
        """
        known = cls._stored()
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown {cls.NOUN} config field {', '.join(unknown)}")
        if missing := sorted(set(known) - set(values)):
            raise ValueError(f"missing {cls.NOUN} config field {', '.join(missing)}")
        return cls(**{name: _as_tuples(value) for name, value in values.items()})

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def describe(self) -> str:
        """A name for messages: "student", "teacher", "ablation 8", "VAE", …"""
        return self.NOUN

    @classmethod
    def _stored(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls) if not f.metadata.get("execution")]


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
