"""Settings: every rule in words, from Python as from the command line."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from deepmim_scale.arguments import parse, parse_run
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.settings import (
    FrozenConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    pluralize,
)


class Inner(FrozenConfig):
    """An object in the settings."""

    width: PositiveInt = 4

    @model_validator(mode="after")
    def _check(self) -> Inner:
        if self.width % 2:
            raise ValueError(f"width={self.width}: must be even")
        return self


class Outer(FrozenConfig):
    """One field of each kind."""

    count: PositiveInt = 1
    start: NonNegativeInt = 0
    rate: PositiveFloat = 1.0
    decay: NonNegativeFloat = 0.0
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    length: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    least: Annotated[int, Field(ge=2)] = 2
    below: Annotated[int, Field(lt=5)] = 0
    maybe: Annotated[int, Field(gt=0, le=10)] | None = None
    kind: Literal["one", "two"] = "one"
    name: str = ""
    switch: bool = False
    shares: tuple[float, ...] = ()
    inner: Inner = Inner()


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "positive": ({"count": 0}, "count=0: must be positive"),
    "positive float": ({"rate": 0.0}, "rate=0.0: must be positive"),
    "not negative": ({"start": -1}, "start=-1: must not be negative"),
    "not negative float": ({"decay": -0.5}, "decay=-0.5: must not be negative"),
    "interval open below": ({"share": 0}, "share=0: must lie in (0, 1]"),
    "interval open above": ({"seed": 2**31}, "seed=2147483648: must lie in [0, 2**31)"),
    "largest": ({"length": 1e20}, "length=1e+20: must be at most 1e6"),
    "least": ({"least": 1}, "least=1: must be at least 2"),
    "below": ({"below": 5}, "below=5: must be less than 5"),
    "optional": ({"maybe": 11}, "maybe=11: must be at most 10"),
    "optional text": ({"maybe": "x"}, "maybe=x: must be a whole number"),
    "fraction": ({"count": 1.5}, "count=1.5: must be a whole number"),
    "word": ({"count": "many"}, "count=many: must be a whole number"),
    "word for a number": ({"rate": "fast"}, "rate=fast: must be a number"),
    "nothing": ({"count": None}, "count=null: must be a whole number"),
    "infinite": ({"rate": float("inf")}, "rate=inf: must be finite"),
    "no number": ({"rate": float("nan")}, "rate=nan: must be finite"),
    "true for a number": ({"count": True}, "count=true: must not be true or false"),
    "true for none": ({"maybe": False}, "maybe=false: must not be true or false"),
    "true for text": ({"name": True}, "name=true: must not be true or false"),
    "true in a list": ({"shares": [True]}, "shares=[True]: must not be true or false"),
    "word in a list": ({"shares": [0.5, "x"]}, "shares=x: must be a number"),
    "choice": ({"kind": "three"}, "kind=three: must be one of one, two"),
    "text": ({"name": 5}, "name=5: must be text"),
    "spaces": ({"kind": "a\nb"}, "kind='a\\nb': must be one of"),
    "switch": ({"switch": "maybe"}, "switch=maybe: must be true or false"),
    "unknown": ({"cuont": 1}, "cuont=1: unknown key; did you mean count?"),
    "unlike any": ({"zzz": 1}, "zzz=1: unknown key; leave it out"),
    "our own name": ({"self": 1}, "self=1: unknown key"),
    "long": ({"kind": "x" * 500}, f"kind={'x' * 60}...: must be one of"),
    "no object": ({"inner": 5}, "inner=5: must be an object"),
    "nested": ({"inner": {"width": 0}}, "width=0: must be positive"),
    "nested rule": ({"inner": {"width": 3}}, "width=3: must be even"),
    "nested unknown": ({"inner": {"widht": 3}}, "widht=3: unknown key; did you mean width?"),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    values, expected = RULES[name]
    for make in (lambda: Outer(**values), lambda: Outer.load(values)):
        with pytest.raises(UserError) as caught:
            make()
        assert str(caught.value).startswith(expected)
        assert "\n" not in str(caught.value)


def test_missing() -> None:
    class Needy(FrozenConfig):
        output: str

    with pytest.raises(UserError, match=r"^output: missing; give a value$"):
        Needy.load({})


def test_replace_checks() -> None:
    config = Outer(count=3, inner=Inner(width=8))
    changed = config.replace(rate=2.0)
    assert (changed.count, changed.rate, changed.inner.width) == (3, 2.0, 8)
    assert config.rate == 1.0
    with pytest.raises(UserError, match=r"^count=0: must be positive$"):
        config.replace(count=0)
    with pytest.raises(UserError, match="did you mean rate"):
        config.replace(rat=1.0)


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer().count = 5


WORDS: dict[str, dict[str, Any]] = {
    "--count 0": {"count": 0},
    "--count many": {"count": "many"},
    "--count 1.5": {"count": 1.5},
    "--rate nan": {"rate": float("nan")},
    "--rate fast": {"rate": "fast"},
    "--share 2": {"share": 2.0},
    "--kind three": {"kind": "three"},
    "--width 3": {"inner": {"width": 3}},
    "--width 0": {"inner": {"width": 0}},
}


@pytest.mark.parametrize("words", WORDS)
def test_command_line_says_the_same(words: str) -> None:
    with pytest.raises(UserError) as from_python:
        Outer(**WORDS[words])
    with pytest.raises(UserError, match=f"^{re.escape(str(from_python.value))}$"):
        parse(Outer, words.split(), prog="test")


def test_runs_say_the_same() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"depth": 99999}, "--depth 99999"),
        ({"taps": "3,,12"}, "--taps 3,,12"),
        ({"method": "simmim"}, "--method simmim"),
        ({"target": "vqgan"}, "--target vqgan"),
        ({"mask_ratio": 1.0}, "--mask-ratio 1"),
    ]
    for values, words in cases:
        with pytest.raises(UserError) as from_python:
            ModelConfig(**values)
        with pytest.raises(UserError, match=f"^{re.escape(str(from_python.value))}$"):
            parse_run(["--preset", "deepmim_vit_b_12", *words.split()], prog="test")


def test_older_names() -> None:
    assert ModelConfig(loss="cosine") == ModelConfig(target="clip")  # type: ignore[call-arg]
    old = RunConfig.load({"hybrid": "runs/mae", "model": {"depth": 12}})
    assert (old.model.target, old.model.teacher) == ("hybrid", "runs/mae")
    with pytest.raises(UserError, match=r"^model=5: must be an object$"):
        RunConfig.load({"teacher": "x", "model": 5})


def test_pluralize() -> None:
    texts = [pluralize(n, "micro-batch", "micro-batches") for n in (0, 1, 2)]
    assert texts == ["0 micro-batches", "1 micro-batch", "2 micro-batches"]
    assert pluralize(2, "replica") == "2 replicas"
