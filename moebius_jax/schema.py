"""Values that check themselves: frozen dataclasses and JSON files whose errors name the field (pydantic)."""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import numpy as np
import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, WrapValidator

from moebius_jax.buckets import location
from moebius_jax.errors import UserError, did_you_mean

T = TypeVar("T")

LARGEST_JSON = 64 << 20  # bytes; the index of a latent cache of 14 M samples is smaller by far

AtLeastZero = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
AtLeast0 = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
File = Annotated[Path, BeforeValidator(lambda x: Path(x) if isinstance(x, str) else x)]
# Beyond any network there is; a damaged file may say anything, and a network is built to be looked at.
Width = Annotated[int, Field(ge=1, le=2**16)]
# As jax does, TPUs before v5, and what is exported to run anywhere.
Platform = Literal["cpu", "gpu", "tpu", "tpu-v4", "portable"]
Side = Annotated[int, Field(ge=1, le=2**12)]
Layers = Annotated[int, Field(ge=1, le=16)]
Location = Annotated[str, AfterValidator(lambda text: location(text) and text)]  # here, or in a bucket
Seed = Annotated[int, Field(ge=0, lt=2**32)]

_KINDS = ("str", "int", "float", "none")  # of a union: pydantic names which it tried, checks as f(kind)
# Types are as declared: no text for a number, no number for a text, neither infinity nor NaN.
_STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, extra="forbid")
_EXPECTED = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "too_short": "{min_length} or more of them",
    "is_instance_of": "a {class}",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text",
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "dataclass_type"), "an object with fields"),
}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def checked(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass whose fields are what their annotations say.

    Creating one raises UserError, a line that begins with the field's name; `__post_init__` may raise more.
    """
    made = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=_STRICT)
    create = made.__init__

    @functools.wraps(create)
    def __init__(self: Any, **values: Any) -> None:
        try:
            create(self, **{name: _plain(value) for name, value in values.items()})
        except pydantic.ValidationError as error:
            raise UserError(explain(error, kind=made)) from None

    made.__init__ = __init__
    return made


def _plain(value: Any) -> Any:
    """Lists as tuples, which are as frozen as the rest, and NumPy's numbers as Python's."""
    if type(value) in (list, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def one_of(known: Container[str] | Iterable[str]) -> AfterValidator:
    """For an annotation: the text is a key of a registry that may still grow."""

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return value

    return AfterValidator(check)


def expecting(what: str) -> WrapValidator:
    """For an annotation of several kinds: says what they are, not what is wrong with the first of them."""

    def check(value: Any, kinds: Callable[[Any], Any]) -> Any:
        try:
            return kinds(value)
        except pydantic.ValidationError:
            raise ValueError(f"expected {what}") from None

    return WrapValidator(check)


def parse_text(text: str | tuple[str, ...], kind: Any, path: str) -> Any:
    """Text as a value of an annotated type, numbers and truth values written as people do.

    Raises:
        UserError: it is none; begins with `path`.
    """
    try:
        return TypeAdapter(kind, config={**_STRICT, "strict": False}).validate_python(text)
    except pydantic.ValidationError as error:
        raise UserError(explain(error, path)) from None


def parse_json(text: str | bytes, kind: type[T]) -> T:
    """JSON as a checked dataclass.

    Raises:
        UserError: it is none; begins with the field's name.
    """
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise UserError(explain(error, kind=kind)) from None


def read_json(file: Path, kind: type[T]) -> T:
    """A JSON file as a checked dataclass.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        UserError: it cannot be read, or is none; names the file and the field.
    """
    try:
        if not (file.is_file() or file.is_dir()) and file.exists():  # a device or pipe never ends
            raise UserError("not an ordinary file")
        if (size := file.stat().st_size) > LARGEST_JSON:
            raise UserError(f"{size:,} bytes; expected {LARGEST_JSON:,} or fewer")
        return parse_json(file.read_bytes(), kind)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def explain(error: pydantic.ValidationError, path: str = "", kind: type | None = None) -> str:
    """The first problem in one line: the field's path (below `path`), what was found, what was expected.

    Args:
        error: of pydantic.
        path: of what was looked at.
        kind: the dataclass it was to be, if it was one: for what an unknown field may have been meant for.
    """
    problems = error.errors(include_url=False)
    unknown = next((p for p in problems if p["type"] == "unexpected_keyword_argument"), None)
    problem = unknown or problems[0]  # a field with a wrong name is missing too
    kind_of_error, context = problem["type"], problem.get("ctx", {})
    # Which branch of a union it tried last says nothing to people.
    below = [str(part) for part in problem["loc"] if part not in _KINDS and "(" not in str(part)]
    path = ".".join(filter(None, [path, *below]))
    if problem is unknown:
        field, known = str(problem["loc"][-1]), _siblings(problem, problems, kind)
        return f"{path}: unknown field{did_you_mean(field, known)}"
    if kind_of_error == "missing":
        return f"{path}: missing field"
    if kind_of_error == "json_invalid":
        return f"not JSON ({context['error']})"
    if kind_of_error == "value_error":
        said = str(context["error"])
        if not said.startswith("expected "):  # it names the field itself
            return ".".join(filter(None, (path, said)))
    else:
        bounds = {
            name: int(x) if isinstance(x, float) and x.is_integer() else x for name, x in context.items()
        }
        said = f"expected {_EXPECTED.get(kind_of_error, problem['msg']).format(**bounds)}"
    found = repr(problem["input"])
    found = found if len(found) <= 80 else f"{found[:79]}…"
    return f"{path} is {found}; {said}" if path else f"found {found}; {said}"


def _siblings(unknown: dict[str, Any], problems: list[dict[str, Any]], kind: type | None) -> list[str]:
    """What may be meant by an unknown field: of the whole any field, further inside what is missing there."""
    *parent, _ = unknown["loc"]
    if not parent and dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return [str(p["loc"][-1]) for p in problems if p["type"] == "missing" and list(p["loc"][:-1]) == parent]
