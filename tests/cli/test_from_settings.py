"""Commands from settings: what options there are, which value wins, and how mistakes are named."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pydantic
import pytest
import typer
from typer.testing import CliRunner

from longspan.cli.from_settings import Part, Used, from_settings, write_used
from longspan.core.config import Commas, Config, Length
from longspan.core.errors import ConfigError, UserError


class Inner(Config):
    """Settings inside others."""

    per_minute: pydantic.PositiveInt | None = None
    """Limit."""
    extra: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Anything."""


class Asked(Config):
    """Settings of a command."""

    length: Length = pydantic.Field(ge=1)
    """Tokens."""
    num_facts: pydantic.PositiveInt = 1
    """Facts; see `sources`."""
    depths: tuple[float, ...] = (0.0, 1.0)
    """Where."""
    sources: tuple[str, ...] = ()
    """Texts with commas."""
    names: Annotated[tuple[str, ...], Commas] = ()
    """Names without."""
    mode: Literal["fast", "slow"] = "slow"
    """How. None: never."""
    repeat: bool = False
    """Whether again."""
    inner: Inner = Inner()
    """More."""

    @pydantic.model_validator(mode="after")
    def _few(self) -> Asked:
        if self.num_facts > 99:
            raise ValueError("num_facts are too many")
        return self


def preset(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a name."""
    return {"num_facts": 7, "mode": "fast"} if given["preset"] else {}


SEEN: dict[str, Any] = {}


@from_settings(
    settings=Part(
        f"{__name__}:Asked",
        names={"sources": "--source"},
        old={"--needles": "num_facts", "--fast": ("mode", "fast"), "--limit": "inner.per_minute"},
        under=preset,
    )
)
def ask(
    settings: Asked,
    used: Used,
    preset: Annotated[str | None, typer.Option(help="A name.")] = None,
    out: Annotated[str, typer.Option(help="Where.")] = "o",
) -> None:
    """Ask."""
    SEEN.update(settings=settings, used=used, preset=preset, out=out)


app = typer.Typer(rich_markup_mode=None, context_settings={"max_content_width": 200})
app.command()(ask)


def call(*words: str) -> Asked:
    SEEN.clear()
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    SEEN["err"] = done.stderr
    return SEEN["settings"]


def test_each_kind_of_field_is_read():
    """A text with a comma was cut in two, or a list of numbers taken for one."""
    found = call(
        *(
            "--length",
            "4k",
            "--num-facts",
            "2e1",
            "--depths",
            "3",
            "--depths",
            "0,0.5, 1",
            "--source",
            "a, b",
        ),
        *("--source", "c", "--names", "x,y,z", "--repeat", "--inner", "{per_minute: 3}"),
    )
    assert (found.length, found.num_facts, found.depths) == (4096, 20, (0, 0.5, 1))
    assert (found.sources, found.names, found.repeat) == (("a, b", "c"), ("x", "y", "z"), True)
    assert found.inner.per_minute == 3


def test_options_outrank_the_file_which_outranks_the_preset(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("length: 8\nnum_facts: 3\nrepeat: true\npreset: p\ninner: {per_minute: 5}\nsource: [a]\n")
    found = call("--settings", str(file), "--no-repeat", "--inner", "{extra: {a: 1}}")
    assert (found.length, found.num_facts, found.mode, found.repeat) == (8, 3, "fast", False)
    assert SEEN["preset"] == "p" and found.inner.extra == {"a": 1} and found.sources == ("a",)
    assert call("--settings", str(file), "--num-facts", "1").num_facts == 1
    assert call("--length", "1", "--preset", "p").num_facts == 7


def test_what_is_written_makes_the_same_again(tmp_path):
    """A default or preset that is not written down is another one with the next release."""
    first = call("--length", "2k", "--preset", "p", "--source", "a, b", "--limit", "4", "--out", "x")
    write_used(SEEN["used"], tmp_path)
    assert "out" not in SEEN["used"]
    assert call("--settings", str(tmp_path)) == first and SEEN["preset"] == "p"
    records = tmp_path / "r.jsonl"
    records.write_text(json.dumps({"kind": "header", "settings": SEEN["used"]}) + "\n{}\n")
    assert call("--settings", str(records)) == first


@pytest.mark.parametrize(
    ("words", "field", "value", "said"),
    [
        ("--needles 5", "num_facts", 5, "write --num-facts"),
        ("--fast", "mode", "fast", "write --mode fast"),
        ("--limit 4", "inner", Inner(per_minute=4), "write --inner '{per_minute: 4}'"),
    ],
)
def test_old_options_work_and_name_the_new_one(words, field, value, said):
    found = call("--length", "1", *words.split())
    assert getattr(found, field) == value and said in SEEN["err"]
    assert words.split()[0] not in CliRunner().invoke(app, ["--help"]).output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-facts 0", "--num-facts: Input should be greater than 0; found: '0'"),
        ("--num-facts two", "--num-facts: this is not a count"),
        ("--needles 0", "--needles: Input should be greater"),
        ("--num-facts 100", "--num-facts are too many"),
        ("--mode quick", "--mode: Input should be 'fast' or 'slow'"),
        ("--inner {per_minutes:3}", "--inner: per_minutes:3: there is no such setting"),
        ("--inner [1]", "--inner does not hold settings"),
        ("--depths 1,x", "--depths: 1: Input should be a valid number"),
    ],
)
def test_mistakes_name_the_option(words, said):
    with pytest.raises(UserError) as caught:
        call("--length", "1", *words.split())
    assert said in str(caught.value)


def test_what_is_missing_is_an_option():
    with pytest.raises(ConfigError, match="--length: this setting is required"):
        call("--num-facts", "1")


def test_a_key_that_is_none_is_named_with_the_nearest(tmp_path):
    file = tmp_path / "s.yaml"
    for text, said in (
        ("num_fact: 3\n", "did you mean 'num_facts'"),
        ("out: x\n", "no such setting as 'out'"),
        ("length: 0\n", "length: Input should be greater"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            call("--settings", str(file))
    (tmp_path / "r.jsonl").write_text('{"kind": "header", "settings": null}\n')
    with pytest.raises(ConfigError, match="not made by a command"):
        call("--settings", str(tmp_path / "r.jsonl"))


def test_help_is_that_of_the_fields():
    shown = " ".join(CliRunner().invoke(app, ["--help"], terminal_width=200).output.split())
    for part in (
        "--length <tokens> Tokens. [1<=x; required]",
        "--num-facts <int> Facts; see --source. [default: 1; 1<=x]",
        "--depths <float> Where. [default: 0,1]",
        "--mode <fast|slow> How. Default: never. [default: slow]",
        "--repeat / --no-repeat Whether again.",
        "--inner <yaml> More.",
    ):
        assert part in shown, shown
