"""The examples of README.md and of docstrings run, on networks with random weights; the ones of docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import asr_kd
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.shards.tarset import Sample, write_index, write_shard
from tests.api.conftest import wav

README = Path(asr_kd.__file__).parent / "api" / "README.md"
EXPORTED = ("losses", "recogniser", "soft_targets", "wer")


@pytest.fixture
def digits(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What README.md finds after `make digits`, smaller."""
    run = tmp_path / "runs" / "digits"
    shutil.copytree(made / "student", run / "student-distilled")
    shutil.copytree(made / "teacher", run / "teacher")
    (tmp_path / "mine" / "audio").mkdir(parents=True)
    (tmp_path / "mine" / "audio" / "test-00000.wav").write_bytes(wav(2.0, 7))
    for name in ("test", "unlabelled"):
        (run / "data" / name).mkdir(parents=True)
        samples = [Sample(f"u{seed}", wav(0.5, seed), "wav", {"seconds": 0.5, "text": "one two"}) for seed in range(16)]
        write_index(run / "data" / name, [write_shard(run / "data" / name / "shard-000000.tar", samples)])
    wanted = {"teacher": str(run / "teacher"), "audio": str(run / "data" / "unlabelled"), "output": str(run / "soft-targets")}  # fmt: skip
    label(LabelSettings.model_validate({**wanted, "device": "cpu"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_from_top_to_bottom(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{README.name}, example {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert names["heard"].text and names["heard"].text in printed
    assert names["course"][-1] < names["course"][0], "the student learns"
    assert names["dense"].shape == (names["target"].frames, names["units"].size)
    assert repr(names["errors"]) in printed and "needs its rate in Hz" in printed.splitlines()[-1]
    assert set(asr_kd.__all__) - {"__version__", "AudioError"} <= set(re.findall(r"asr_kd\.(\w+)", "".join(blocks)))


@pytest.mark.parametrize("name", EXPORTED)
def test_examples_of_docstrings_say_what_they_print(name: str, here: Path) -> None:
    module = importlib.import_module(f"asr_kd.api.{name}")
    known = {"asr_kd": asr_kd, "np": np, "soundfile": soundfile}
    found = doctest.testmod(module, extraglobs=known, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0 and (found.attempted or name == "losses")


def test_every_public_name_is_described_on_the_page_and_is_there() -> None:
    page = README.read_text()
    assert dir(asr_kd) == sorted(asr_kd.__all__)
    for name in asr_kd.__all__:
        assert f"asr_kd.{name}" in page and getattr(asr_kd, name) is not None


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("targets", "; did you mean soft_targets?"), ("lod", "; did you mean load?"), ("Usererror", "; did you mean UserError?"), ("train", ""),
        ("err", ""), ("__path", ""),
    ],
)  # fmt: skip
def test_a_name_that_is_not_there_is_told_with_one_that_is_near(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(asr_kd, name, raising=False)  # another test may have imported the package of this name
    with pytest.raises(AttributeError) as caught:
        getattr(asr_kd, name)
    assert str(caught.value) == f"module 'asr_kd' has no attribute '{name}'{hint}"
