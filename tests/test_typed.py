from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from asr_kd.config.base import Location, Settings
from asr_kd.config.load import build, load_yaml, override
from asr_kd.errors import UserError
from asr_kd.pipeline import ScriptSettings
from asr_kd.shards.settings import UnitsSettings
from asr_kd.targets.settings import CombineSettings, InspectSettings
from asr_kd.typed import parse_yaml

#: what YAML makes something else of, or nothing
WORDS = [
    "0012", "2024-11-28", "on", "No", "null", "~x", "1e3", "1_000", "12:30:45", "0x1F", ".5", ".inf", "a #b", "a: b", "{a", "[a", "a]",
    "*a", "&a", "!a", "%a", "@a", "`a", "- a", "'a", '"a"', "a ", " a", "a\tb", "a\nb", "#a", "?", "-", ":", "|", ">", "é",
]  # fmt: skip


class Kinds(Settings):
    text: str = "default"
    maybe: str | None = "default"
    texts: list[str] = Field(default_factory=list)
    named: dict[str, str] = Field(default_factory=dict)
    either: Location | dict[str, Location] = "default"
    number: float | None = 1.0
    whole: int = 1
    switch: bool = False
    words: list[str | int | float] = Field(default_factory=list)
    inner: Kinds | None = None


def typed(*assignments: str, **values: Any) -> Kinds:
    return build(Kinds, override(values, list(assignments)), "here", assignments)


def in_file(folder: Path, text: str) -> Kinds:
    (folder / "a.yaml").write_text(text)
    return build(Kinds, load_yaml(folder / "a.yaml", as_typed=True), "a.yaml")


@pytest.mark.parametrize("word", WORDS)
def test_a_text_on_the_command_line_is_what_was_typed(word: str) -> None:
    settings = typed(f"text={word}", f"maybe={word}", f"inner.text={word}")
    assert settings.inner
    assert [settings.text, settings.maybe, settings.inner.text] == [word] * 3
    assert type(settings.text) is str


@pytest.mark.parametrize(
    ("word", "value"), [("null", None), ("~", None), ("", None), ("development", "development"), ("[1, 2.5]", [1, 2.5])]
)
def test_null_is_no_word_of_a_choice(word: str, value: Any, tmp_path: Path) -> None:
    """Of an optional choice it means none, on the command line as in a file."""
    assert build(CombineSettings, override({}, [f"weights={word}"]), "here", [f"weights={word}"]).weights == value
    (tmp_path / "a.yaml").write_text(f"weights: {word}")
    assert build(CombineSettings, load_yaml(tmp_path / "a.yaml", as_typed=True), "a.yaml").weights == value
    with pytest.raises(UserError, match=r"command line: weights: .*'none'"):
        build(CombineSettings, override({}, ["weights=none"]), "here", ["weights=none"])


@given(st.text(min_size=1))
def test_whatever_is_typed_is_the_text(word: str) -> None:
    assert typed(f"maybe={word}").maybe == word


@pytest.mark.parametrize("word", ["0012", "2024-11-28", "on", "No", "null", "1e3", "1_000", "12:30", "0x1F", ".5", ".inf"])  # fmt: skip
def test_a_text_in_a_file_is_what_was_typed(tmp_path: Path, word: str) -> None:
    found = in_file(
        tmp_path,
        f"text: {word}\ntexts: [{word}, b]\nnamed: {{{word}: {word}}}\neither: {{a: {word}}}\ninner: {{text: {word}}}\n",
    )
    inner = found.inner and found.inner.text
    assert (found.text, found.texts, found.named, found.either, inner) == (
        word,
        [word, "b"],
        {word: word},
        {"a": word},
        word,
    )
    flow = typed(f"texts=[{word}, b]", f"named={{{word}: {word}}}", f"either={{a: {word}}}")
    assert (flow.texts, flow.named, flow.either) == ([word, "b"], {word: word}, {"a": word})


def test_an_optional_text_is_left_out_by_nothing_and_in_a_file_by_null(tmp_path: Path) -> None:
    assert typed("maybe=").maybe is None
    assert typed("maybe=null").maybe == "null"
    for text in ("maybe:", "maybe: null", "maybe: ~"):
        assert in_file(tmp_path, text).maybe is None
    assert in_file(tmp_path, 'maybe: "null"').maybe == "null"
    assert in_file(tmp_path, "text: null").text == "null", "what must be there is a word"


def test_numbers_switches_lists_and_groups_stay_what_they_are(tmp_path: Path) -> None:
    for found in (
        typed("number=1e-3", "whole=0x10", "switch=on", "inner={number: null, whole: 7}"),
        in_file(tmp_path, "number: 1e-3\nwhole: 0x10\nswitch: on\ninner: {number: null, whole: 7}\n"),
    ):
        assert (found.number, found.whole, found.switch) == (1e-3, 16, True)
        assert found.inner and (found.inner.number, found.inner.whole) == (None, 7)
    assert typed("number=null").number is None and typed("inner=null").inner is None
    assert typed("inner={whole: 3}", "inner.switch=true", "inner.whole=4").inner == Kinds(whole=4, switch=True)
    with pytest.raises(UserError, match=r"whole: input should be a valid integer \(given: '7'\)"):
        in_file(tmp_path, "whole: '7'")


def test_arguments_of_a_script_are_numbers_only_where_that_loses_nothing() -> None:
    words = typed("words=[1, 0.5, 0012, 1e3, on, 1_0, a]").words
    assert words == [1, 0.5, "0012", "1e3", "on", "1_0", "a"]
    assert [type(word) for word in words[:2]] == [int, float]


def test_what_was_loaded_is_written_and_loaded_again(tmp_path: Path) -> None:
    settings = typed(*(f"text={word}" for word in WORDS), "maybe=", "named={no: 0012}", "words=[1, 0x1]")
    assert in_file(tmp_path, yaml.safe_dump(settings.model_dump(), allow_unicode=True)) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text: a\nmaybe: b\ntext: c\n", r"line 3: the key text stands twice \(first in line 1\); remove one"),
        ("inner:\n  whole: 1\n  inner: {text: a, 'text': b}\n", "line 3: the key text stands twice"),
        ("named:\n- {a: 1}\n- {a: 1, b: 2, a: 3}\n", "line 3: the key a stands twice"),
        ("named: {on: a, on: b}", "line 1: the key on stands twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    for as_typed in (True, False):
        with pytest.raises(UserError, match=f"^{path}: {message}"):
            load_yaml(path, as_typed)
    with pytest.raises(UserError, match=r"^named={a: 1, a: 2}: line 1: the key a stands twice"):
        typed("named={a: 1, a: 2}")


def test_what_is_merged_may_stand_again(tmp_path: Path) -> None:
    text = "inner: &base {whole: 3, number: 2}\n<<: *base\nnumber: 5\ntext: &t 0012\nmaybe: *t\n"
    found = in_file(tmp_path, text)
    assert (found.whole, found.number, found.text, found.maybe) == (3, 5.0, "0012", "0012")
    assert found.inner and found.inner.number == 2.0


def test_what_holds_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        in_file(tmp_path, "inner: &a {inner: *a}\n")


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_place_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^command line: output: is empty where a file or folder belongs"):
        build(UnitsSettings, override({}, ["source=a", f"output={text}"]), "command line", [f"output={text}"])


def test_places_are_read_alike_from_python_and_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert UnitsSettings(source="~/a", output="S3://b/c") == UnitsSettings(source="/home/me/a", output="s3://b/c")
    with pytest.raises(ValidationError, match="not quite a URL"):
        UnitsSettings(source="a", output="s3:/b")
    with pytest.raises(
        UserError, match=r"^x: output: is not quite a URL; write s3://b/c, or ./s3:/b/c for a local name"
    ):
        build(ScriptSettings, override({"file": "a"}, ["output=s3:/b/c"]), "x")
    assert build(InspectSettings, override({}, ["targets=t", "key=0012"]), "x").key == "0012"


def test_yaml_knows_numbers_as_everybody_writes_them() -> None:
    numbers = parse_yaml("[12, -1_000, 0, 0x1F, 0b11, 1e3, 1.5e-3, .5, 5., -.inf, +2]", "x")
    assert numbers == [12, -1000, 0, 31, 3, 1000.0, 0.0015, 0.5, 5.0, float("-inf"), 2]
    texts = ["2024-11-28", "0012", "12:30", "1:30.5", "1e", ".", "1.2.3", "_1"]
    assert parse_yaml(f"[{', '.join(texts)}]", "x") == texts
    with pytest.raises(UserError, match=r"whole: input should be a valid integer \(given: '0012'\)"):
        typed("whole=0012")
