"""What every network's configuration can do: be stored as JSON, be read again, be named in a message."""

import dataclasses
import json
from typing import Any, ClassVar, Self

from moebius_jax.schema import checked, parse_json

EXECUTION = {"execution": True}  # marks fields that choose how to compute, not what
ADDED = {"added": True}  # marks fields that folders may lack, having been written before they were thought of


@checked
class Architecture:
    """Sizes and switches of a network, without its weights.

    Attributes:
        NOUN: what such a network is called.
    """

    NOUN: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; execution choices are left out."""
        return json.loads(json.dumps({name: getattr(self, name) for name in self._stored()}))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown or missing field, or a value that is out of range.
        """
        stored = cls._stored()
        added = {f.name for f in dataclasses.fields(cls) if f.metadata.get("added")}
        if odd := sorted((set(values) ^ set(stored)) - (added - set(values))):
            raise ValueError(f"{odd[0]}: {'unknown' if odd[0] in values else 'missing'} field")
        return parse_json(json.dumps(values), cls)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def describe(self) -> str:
        """A name for messages: "student", "teacher", "ablation 8", "VAE", …"""
        return self.NOUN

    @classmethod
    def _stored(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls) if not f.metadata.get("execution")]
