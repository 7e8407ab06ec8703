"""Settings: unknown keys named with the nearest one, overrides, the way through YAML, fingerprints."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.config import Config, apply_overrides, parse_yaml, read_yaml
from longspan.core.errors import ArgumentError, ConfigError


class Optimizer(Config):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-4


class Stage(Config):
    context_length: int
    optimizer: Optimizer = Optimizer()


class Source(Config):
    lr: Optimizer = Optimizer()  # the name of a setting that is also used as a key below
    weight: float = 1.0


class Linear(Config):
    kind: Literal["linear"] = "linear"
    factor: float = 1.0


class Yarn(Config):
    kind: Literal["yarn"] = "yarn"
    beta_fast: float = 32.0


class Recipe(Config):
    title: str = "run"
    seed: int = 0
    stages: list[Stage] = pydantic.Field(default_factory=list)
    sources: dict[str, Source] = pydantic.Field(default_factory=dict)
    by_length: dict[int, float] = pydantic.Field(default_factory=dict)
    extra: Optimizer | None = None
    pair: tuple[Optimizer, Stage] | None = None
    nested: Annotated[list[dict[str, Stage]] | None, pydantic.Field(description="deep")] = None
    rope: Annotated[Linear | Yarn, pydantic.Field(discriminator="kind")] = Linear()
    either: Optimizer | Source | None = None

    @pydantic.model_validator(mode="after")
    def check(self) -> Recipe:
        lengths = [stage.context_length for stage in self.stages]
        if lengths != sorted(lengths):
            raise ValueError("stages: context lengths must not shrink")
        return self


def message(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(values, where="recipe.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "dotted", "near"),
    [
        ({"titel": "x"}, "titel", "title"),
        ({"extra": {"lrr": 1}}, "extra.lrr", "lr"),
        (
            {"stages": [{"context_length": 1}, {"contxt_length": 2}]},
            "stages.1.contxt_length",
            "context_length",
        ),
        ({"stages": [{"context_length": 1, "optimizer": {"nam": "sgd"}}]}, "stages.0.optimizer.nam", "name"),
        ({"sources": {"web": {"weigth": 1}}}, "sources.web.weigth", "weight"),
        ({"pair": [{}, {"context_length": 1, "optimiser": {}}]}, "pair.1.optimiser", "optimizer"),
        ({"nested": [{"a": {"context_lenght": 1}}]}, "nested.0.a.context_lenght", "context_length"),
        ({"rope": {"kind": "yarn", "beta_fsat": 1}}, "rope.yarn.beta_fsat", "beta_fast"),
        ({"either": {"wieght": 1}}, "either.Source.wieght", "weight"),
    ],
)
def test_unknown_key_names_the_dotted_key_and_the_nearest(values, dotted, near):
    text = message(values)
    assert f"{dotted}: there is no such setting; did you mean {near!r}?" in text


def test_dict_key_with_the_name_of_a_setting():
    """A source called "lr" sent the search into the setting `lr`, and the hint was empty."""
    assert "sources.lr.weigth: there is no such setting; did you mean 'weight'?" in message(
        {"sources": {"lr": {"weigth": 1}}}
    )


def test_far_off_key_lists_what_is_allowed():
    assert "extra.zzz: there is no such setting; allowed: lr, name" in message({"extra": {"zzz": 1}})


def test_hint_of_a_union_keeps_to_the_chosen_member():
    """The hint for a YaRN setting must not offer the settings of linear scaling."""
    assert "allowed: beta_fast, kind" in message({"rope": {"kind": "yarn", "factor": 2}})


def test_every_mistake_is_reported_at_once():
    text = message({"titel": "x", "seed": "many", "stages": [{}]})
    assert "titel: there is no such setting" in text
    assert "seed: " in text and "found: 'many'" in text
    assert "stages.0.context_length: this setting is required" in text


def test_a_wrong_entry_does_not_make_its_list_too_short():
    """Beside what was wrong stood that there are no stages, and all of them were printed."""

    class Several(Config):
        stages: tuple[Stage, ...] = pydantic.Field(min_length=1)

    with pytest.raises(ConfigError) as caught:
        Several.from_dict({"stages": [{"context_length": "x"}]})
    assert "stages.0.context_length" in str(caught.value) and "at least 1" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"stages: .*at least 1"):
        Several.from_dict({"stages": []})


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_numbers_are_finite(value):
    """A learning rate of infinity passed as one above 0."""
    with pytest.raises(ConfigError, match=r"stages\.0\.optimizer\.lr.*finite"):
        Recipe.from_dict(
            parse_yaml(f"stages: [{{context_length: 8, optimizer: {{lr: {value}}}}}]", where="r")
        )


def test_check_of_several_settings_does_not_print_them_all():
    """The input of a whole-model check is the whole model; it stood in the message, 400 characters of it."""
    text = message({"stages": [{"context_length": 8}, {"context_length": 4}]})
    assert text == "recipe.yaml is not valid:\n  stages: context lengths must not shrink"


def test_own_error_inside_a_check_names_the_file():
    """pydantic lets our errors through untouched; the file's name was lost on the way."""

    class Strict(Config):
        length: str = ""

        @pydantic.field_validator("length")
        @classmethod
        def check(cls, value: str) -> str:
            raise ArgumentError("this is not a length", found=value)

    with pytest.raises(ConfigError, match=r"mine\.yaml is not valid"):
        Strict.from_dict({"length": "x"}, where="mine.yaml")


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(pydantic.ValidationError):
        Optimizer().lr = 1.0  # type: ignore[misc]


# --- YAML


def yaml_of(text: str) -> dict:
    return parse_yaml(text, where="t.yaml")


def test_exponent_without_a_point_is_a_number():
    """YAML 1.1 reads 1e-4 as the text "1e-4"."""
    assert yaml_of("a: 1e-4\nb: -2E+3\nc: 1.5e4\nd: e4") == {"a": 1e-4, "b": -2000.0, "c": 15000.0, "d": "e4"}


def test_dates_stay_text():
    """A date object is not a setting; an impossible date ended in a traceback."""
    assert yaml_of("a: 2026-01-31\nb: 2026-13-45") == {"a": "2026-01-31", "b": "2026-13-45"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1,\nb: 2", "t.yaml:2 is not valid YAML"),
        ("a: 1\na: 2", "the key 'a' stands twice in the mapping that begins at line 1"),
        ("a: 1\nb:\n  c: 1\n  c: 2", "the key 'c' stands twice in the mapping that begins at line 3"),
        ("- 1\n- 2", "t.yaml does not hold settings"),
        ("", "t.yaml does not hold settings\n  found: nothing"),
        ("server.yaml", "found: str 'server.yaml'"),
        ("a: !!int word", "t.yaml"),
        ("a: !!python/object:os.system x", "t.yaml:1 is not valid YAML"),
        ("a: \0", "t.yaml is not valid YAML"),
    ],
)
def test_broken_yaml_names_the_place(text, part):
    with pytest.raises(ConfigError) as caught:
        yaml_of(text)
    assert part in str(caught.value)


def test_merged_anchors_are_not_repeated_keys():
    """`<<: *base` copies keys; checking after the copy called a chain of two merges a repeated key."""
    text = "a: &a {lr: 1}\ngroup:\n  b: &b {<<: *a, lr: 2}\nx: {<<: *b, lr: 3}\n"
    assert yaml_of(text) == {"a": {"lr": 1}, "group": {"b": {"lr": 2}}, "x": {"lr": 3}}


def test_unreadable_files_are_user_errors(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "title", ["12e5", "1e-4", "null", "yes", "0x10", "2026-01-31", "1:30", "a: b", " x ", ""]
)
def test_text_survives_the_way_through_yaml(tmp_path, title):
    """A title (or a hash) such as "12e5" was written without quotes, read back as a number, and refused."""
    recipe = Recipe(title=title)
    recipe.to_yaml(tmp_path / "r.yaml")
    assert Recipe.from_yaml(tmp_path / "r.yaml") == recipe


@settings(max_examples=40, deadline=None)
@given(
    title=st.text(),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    by_length=st.dictionaries(st.integers(0, 2**40), st.floats(0, 1)),
)
def test_settings_survive_the_way_through_yaml(tmp_path_factory, title, lr, by_length):
    path = tmp_path_factory.mktemp("yaml") / "r.yaml"
    recipe = Recipe(
        title=title, extra=Optimizer(lr=lr), by_length=by_length, stages=[Stage(context_length=1)]
    )
    recipe.to_yaml(path)
    again = Recipe.from_yaml(path)
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


# --- overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=1e-3", {"a": 1e-3, "list": [{"x": 1}, {"x": 2}], "none": None, 4096: 0.5}),
        ("list.1.x=5", {"a": 0, "list": [{"x": 1}, {"x": 5}], "none": None, 4096: 0.5}),
        ("list.0={y: [1, 2]}", {"a": 0, "list": [{"y": [1, 2]}, {"x": 2}], "none": None, 4096: 0.5}),
        (
            "new.deep=x=y",
            {"a": 0, "list": [{"x": 1}, {"x": 2}], "none": None, 4096: 0.5, "new": {"deep": "x=y"}},
        ),
        ("none.lr=1", {"a": 0, "list": [{"x": 1}, {"x": 2}], "none": {"lr": 1}, 4096: 0.5}),
        ("a=", {"a": None, "list": [{"x": 1}, {"x": 2}], "none": None, 4096: 0.5}),
        ("4096=0.25", {"a": 0, "list": [{"x": 1}, {"x": 2}], "none": None, 4096: 0.25}),
    ],
)
def test_override(override, expected):
    values = {"a": 0, "list": [{"x": 1}, {"x": 2}], "none": None, 4096: 0.5}
    assert apply_overrides(values, [override]) == expected
    assert values["list"] == [{"x": 1}, {"x": 2}]  # the original stays as it was


def test_later_override_wins():
    assert apply_overrides({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("a", "key=value"),
        ("=1", "key=value"),
        ("a..b=1", "key=value"),
        ("a.b=1", "a is a single value"),
        ("list.7.x=1", "allowed: 0 to 0"),
        ("list.x=1", "there is no item 'x' in list"),
        ("empty.0=1", "the list is empty"),
        ("a=[1", "the value of a is not valid YAML"),
        ("a={b: 1, b: 2}", "the value of a is not valid YAML"),
    ],
)
def test_broken_override(override, part):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"a": 0, "list": [{}], "empty": []}, [override])
    assert part in str(caught.value)


def test_override_of_an_unknown_setting_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("title: x\n")
    with pytest.raises(ConfigError, match=r"extra\.lrr.*did you mean 'lr'"):
        Recipe.from_dict(apply_overrides(read_yaml(tmp_path / "r.yaml"), ["extra.lrr=1"]))


# --- fingerprints


def test_fingerprint_changes_exactly_with_a_setting():
    base = Recipe()
    assert base.fingerprint() == Recipe(seed=0).fingerprint()
    others = [Recipe(seed=1), Recipe(title="b"), Recipe(rope=Yarn()), Recipe(extra=Optimizer())]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    assert len(base.fingerprint()) == 16
