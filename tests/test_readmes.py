"""Whatever READMEs tell a reader to type is taken by the program, and what they show is what it prints (`readmes.py` says how)."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from asr_kd import cli, pipeline
from asr_kd.config.verbs import VERBS
from asr_kd.shards.tarset import read_index, read_shard, write_index, write_shard
from tests import readmes, stages
from tests.readmes import ROOT, Command, blocks

FILES = readmes.readmes()
#: of the digits, in small
MINUTES = {"test": 2, "development": 2, "labelled": 4, "unlabelled": 5}
NAMES = [str(file.relative_to(ROOT)) for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_every_command_is_marked_and_has_the_words_that_the_program_knows(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert not (found := wrong(file)), "\n".join(found)


def wrong(file: Path) -> list[str]:
    """Blocks without a marker (of READMEs), and commands that the program would not take."""
    found = []
    for block in blocks(file):
        if file.name == "README.md" and (not block.marker or (block.marker == "not run" and not block.why)):
            found.append(f"{block.where}: put <!-- run --> or <!-- not run: why --> in front; see tests/readmes.py")
        for command in block.commands:
            found += [
                f"{block.where}: {wrong}" for wrong in ([] if command.refused else readmes.mistakes(command.text))
            ]
    return found + [
        f"{file}: {wrong}" for text in readmes.inline(file) for wrong in readmes.mistakes(text, whole=False)
    ]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("asr-kd label teacher=t audio=a", "output: Field required"),
        ("asr-kd label teacher=t audio=a output=o mode=best", "mode: Input should be"),
        ("asr-kd label teacher=t audi=a … output=o", "audi: Extra inputs are not permitted"),
        ("asr-kd lable teacher=t", "invalid choice: 'lable'"),
        ("asr-kd run pipelines/digits passes=1", "has no variable passes"),
        ("asr-kd eval audio=a output=o 'systems={s: t}' --fail-if 's.wer >'", "--fail-if"),
        ("cat list | asr-kd prepare manifest=- output=o worker=2", "worker: Extra"),
        ("sbatch --array=0-9 --wrap 'asr-kd prepare manifest=m output=o worker=2'", "worker: Extra"),
        ("torchrun --nproc-per-node 4 -m asr_kd.cli train run.yaml lane=4", "lane: Extra"),
        ("python pipelines/digits/measure.py --sed 0", "--sed"),
        ("python pipelines/digits/measures.py", "measures.py is not there"),
        ("python -m tests.benchmarks.report_pages", "tests.benchmarks.report_pages is not there"),
        ("pip install -e '.[hugging]'", "hugging: no extra of pyproject.toml"),
        ("make digit", "digit: no target of the Makefile"),
    ],
)
def test_what_is_wrong_is_named(line: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "README.md"
    file.write_text(f"Text\n\n```\n{line}\n```\n")
    found = wrong(file)
    assert found[0] == "README.md:3: put <!-- run --> or <!-- not run: why --> in front; see tests/readmes.py"
    assert any(named in one for one in found[1:]), found
    file.write_text(f"Text\n\n<!-- not run: takes hours -->\n```\n{line}\n```\n")
    assert [one.partition(": ")[2] for one in wrong(file)] == [one.partition(": ")[2] for one in found[1:]]


def test_what_is_printed_otherwise_is_named(tmp_path: Path) -> None:
    shown = "<!-- run; may differ: 0.99 | seven four -->\n```\n$ asr-kd lm\n…\nkept 0.99 of 10: seven four\n```\n"
    (tmp_path / "README.md").write_text(shown)
    (block,) = blocks(tmp_path / "README.md")
    (command,) = block.commands
    assert not readmes.difference(block, command, "kept 1,234.5 of 10: one\n")
    assert not readmes.difference(block, command, "a\nb\nkept 1e-05 of 10: \n")
    assert not readmes.difference(block, Command("asr-kd lm", ["kept … of 10: seven four", "…"]), "kept any of 10: \n")
    for printed in ("kept 0.99 of 11: seven four\n", "kept of 10: one\n", "kept 0.99 of 10: seven four\nmore\n", ""):
        assert "README.md:2: asr-kd lm" in readmes.difference(block, command, printed)


def test_without_make_it_is_what_make_does() -> None:
    """The block of asr_kd/README.md without make, against the recipes of the Makefile for an environment that is not there."""
    ours = next(block for block in blocks(ROOT / "asr_kd" / "README.md") if "-m venv" in block.commands[0].text)
    command = ["make", "-n", "digits", "test", "VENV=.absent", "PYTHON=python3"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = made.stdout.replace(" --disable-pip-version-check", "").replace(".absent", ".venv").splitlines()
    for typed in ours.commands:
        assert typed.text.partition(" #")[0].strip() in [line.strip() for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after `make digits`, in small: fewer minutes, a pass, a small teacher; reports to compare, and a teacher from outside."""
    from tests.outside import write_wave

    folder = tmp_path_factory.mktemp("finished")
    (folder / "data_manifests").symlink_to(ROOT / "data_manifests")
    shutil.copytree(ROOT / "pipelines", folder / "pipelines")
    _make_small(folder / "pipelines" / "digits" / "pipeline.yaml")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        stages.here(patch)
        pipeline.run_pipeline("pipelines/digits", [])
        data, heard = Path("runs/digits/data/test"), Path("runs/digits/data/heard")
        heard.mkdir()
        few = list(read_shard(data / read_index(data)[0].name))[:2]
        write_index(heard, [write_shard(heard / "shard-000000.tar", few)])
        Path("runs/tars").mkdir()
        shutil.copy(heard / "shard-000000.tar", "runs/tars/others.tar")
        Path("runs/wave").mkdir()
        write_wave(Path("runs/wave"))
        _record(Path("runs"), few)
        for name in ("old", "new", "a", "b"):
            words = ["systems={student: runs/digits/student-distilled}", f"audio={heard}", f"output=runs/{name}/report"]
            assert cli.main(["eval", *words]) == 0
    return folder


def _record(folder: Path, utterances: list[Any]) -> None:
    """Two recordings of utterances with pauses between them and one in which nobody speaks, and their list."""
    quiet = np.random.default_rng(0).normal(0, 1e-4, 8000)
    said = [soundfile.read(io.BytesIO(utterance.audio))[0] for utterance in utterances]
    for name, parts in {"meeting": said, "talk": said[::-1], "silence": [quiet]}.items():
        soundfile.write(
            folder / f"{name}.flac", np.concatenate([quiet, *(np.concatenate([part, quiet]) for part in parts)]), 8000
        )
    (folder / "talks.jsonl").write_text(
        "".join(f'{{"audio": "{name}.flac"}}\n' for name in ("meeting", "talk", "silence"))
    )


def _make_small(file: Path) -> None:
    """Change a copy of the digits' pipeline."""
    values: dict[str, Any] = yaml.safe_load(re.sub(r"\b(passes|size): (14|30|36|224)\b", r"\1: 1", file.read_text()))
    of_digits = values["stages"]
    of_digits["data"]["settings"]["arguments"] += [f"--{name}={few}" for name, few in MINUTES.items()]
    for name in ("student-oracle", "pseudo-labels", "student-pseudo-label"):
        del of_digits[name]
        of_digits["report"]["settings"]["systems"].pop(name, None)
    for stage in of_digits.values():
        if stage["verb"] == "train":
            stage["settings"]["tensorboard"] = False
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def test_what_is_shown_is_what_is_printed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the READMEs, each in a folder of its own, where it finds what those before it have made of the digits."""
    found = []
    for number, file in enumerate(FILES):
        marked = [block for block in blocks(file) if block.marker == "run"]
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        for name in ("pipelines", "data_manifests", "runs"):
            Path(name).symlink_to(finished / name)
        for name in ("mine", "shards"):
            (finished / "runs" / name).mkdir(exist_ok=True)
            Path(name).symlink_to(finished / "runs" / name)
        for block in marked:
            for command in block.commands:
                text = command.text
                for what, other in block.instead.items():
                    text = text.replace(what, other)
                status, printed = readmes.run(text)
                if status not in ({2} if command.refused else {0, 1} if "--fail-if" in text else {0}):
                    found.append(f"{block.where}: {text}: status {status}\n{printed}")
                found += filter(None, [readmes.difference(block, command, printed)])
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("file", [*FILES, ROOT / "CONTRIBUTING.md"], ids=[*NAMES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(file: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        if re.match(r"\w+:", target):
            continue
        if not there.exists() or (anchor and anchor not in headings(there)):
            lost.append(target)
    assert not lost


def headings(file: Path) -> set[str]:
    """The anchors of a Markdown file, as GitHub makes them of its headings."""
    lines = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_every_verb_has_a_section() -> None:
    page = ROOT / "asr_kd" / "config" / "README.md"
    assert {name for name, verb in VERBS.items() if verb.help} <= headings(page)
