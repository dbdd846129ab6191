"""The base of all settings: immutable, checked, and refused with one readable line."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Annotated, Any, Protocol, Self

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from deepmim_scale.errors import UserError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _default_hint(default: str) -> str:
    return "" if default in ("", "''", "None") else f"(default: {default})"


def shown_as(metavar: str, text: str | None = None, name: str | None = None) -> Any:
    """How a flag stands in the help; a default of nothing is left to its text."""
    return tyro.conf.arg(name=name, metavar=metavar, help=text, help_behavior_hint=_default_hint)


Folder = Annotated[str, shown_as("DIR")]
File = Annotated[str, shown_as("FILE")]


def comma_separated(read: Callable[[str], tuple[Any, ...]], metavar: str) -> Any:
    """A flag of one word whose parts `read` takes apart."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


Names = Annotated[
    tuple[str, ...],
    comma_separated(lambda text: tuple(dict.fromkeys(text.split(","))), "NAME,NAME,..."),
]

_TYPE_RULES = {
    "finite_number": "must be finite",
    "int_": "must be a whole number",
    "float_": "must be a number",
    "bool_": "must be true or false",
    "string_": "must be text",
    "model_": "must be an object",
    "extra_forbidden": "unknown key",
}


class FrozenConfig(BaseModel):
    """Base of all settings: immutable, finite, unknown keys refused.

    UserError, with the command line's message, for values that do not fit.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    # Positional-only, since a file may hold the key "self".
    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(_describe(type(self), error.errors()[0])) from None

    @classmethod
    def load(cls, values: dict[str, Any]) -> Self:
        """From plain values, such as a JSON file's; UserError names what does not fit."""
        return cls(**values)

    def replace(self, **changes: Any) -> Self:
        """The same settings with some changed, checked again (pydantic's own copy checks none)."""
        return type(self)(**(dict(self) | changes))

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: Any) -> Any:
        # pydantic takes true for 1, which in a file is a slip.
        if cls.model_fields[info.field_name].annotation is not bool:
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, bool):
                    rule = "must not be true or false"
                    raise ValueError(f"{info.field_name}={_show(value)}: {rule}")
        return value


def _describe(config_class: type[FrozenConfig], error: ErrorDetails) -> str:
    """`key=value: rule` of pydantic's first finding."""
    if error["type"] == "value_error":  # our own checks say key and value themselves
        return error["msg"].removeprefix("Value error, ")
    # An element of a list has an index behind its key; an object in it has a config of its own.
    key = str(error["loc"][0]) if error["loc"] else "settings"
    if error["type"] == "missing":
        return f"{key}: missing; give a value"
    shown = _show(error["input"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, config_class.model_fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else "leave it out"
        return f"{key}={shown}: unknown key; {remedy}"
    return f"{key}={shown}: {_rule(config_class, error)}"


def _show(value: Any, most: int = 60) -> str:
    """A value as it would be typed, in one line."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    else:
        # A word needs no quotes; an empty one or one with spaces does.
        text = repr(value) if isinstance(value, str) and value.split() != [value] else str(value)
    return text if len(text) <= most else text[:most] + "..."


def _rule(config_class: type[FrozenConfig], error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        field = config_class.model_fields.get(str(error["loc"][0]))
        return _bounds(field.metadata if field else [], kind, next(iter(context.values())))
    for prefix, rule in _TYPE_RULES.items():
        if kind.startswith(prefix):
            return rule
    if kind == "literal_error":
        return f"must be one of {context['expected'].replace(' or ', ', ')}".replace("'", "")
    return f"{error['msg'][0].lower()}{error['msg'][1:]}"


def _bounds(metadata: list[Any], kind: str, bound: float) -> str:
    """A range in words; an interval where both ends are worth knowing."""
    ends = {
        n: getattr(part, n)
        for part in metadata
        for n in ("gt", "ge", "lt", "le")
        if getattr(part, n, None) is not None
    }
    low, high = ends.get("gt", ends.get("ge")), ends.get("lt", ends.get("le"))
    if low is not None and high is not None and ("ge" in ends or high <= 1):
        left, right = "(["["ge" in ends], ")]"["le" in ends]
        return f"must lie in {left}{_number(low)}, {_number(high)}{right}"
    if kind.startswith("greater"):
        words = {"greater_than0": "be positive", "greater_than_equal0": "not be negative"}
        return f"must {words.get(f'{kind}{bound:g}', f'be at least {_number(bound)}')}"
    return f"must be {'less than' if kind == 'less_than' else 'at most'} {_number(bound)}"


def _number(value: float) -> str:
    """2**31 and 1e6 are easier to read than their digits."""
    exponent = int(value).bit_length() - 1
    if exponent > 20 and value == 2**exponent:
        return f"2**{exponent}"
    return f"{value:g}".replace("e+0", "e").replace("e+", "e")


def pluralize(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun, as `1 replica`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


class RunLength(Protocol):
    """How long a run of any kind is."""

    @property
    def epochs(self) -> float:
        """Passes over the data."""

    @property
    def steps(self) -> int | None:
        """Optimizer steps, which replace epochs where they are given."""
