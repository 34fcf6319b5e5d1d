"""Recipes that come with the package: what setup.py puts into a wheel, and how `asr-kd run NAME` finds and runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asr_kd import cli, recipes
from asr_kd.pipeline import load_pipeline

ROOT = Path(__file__).parents[1]
PIPELINE = """
variables: {run: out, more: none}
stages:
  copy:
    verb: script
    settings: {file: pipelines/tiny/copy.py, output: "${run}/copy.txt", arguments: [data_manifests/words.txt, "${more}"]}
"""
SCRIPT = "import shutil, sys; shutil.copy(sys.argv[3], sys.argv[2]); print('from', __file__)"
Run = Callable[..., str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it lies in a wheel."""
    folder = tmp_path_factory.mktemp("built")
    words = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", *words], cwd=ROOT, check=True, capture_output=True)
    return folder / "lib" / "asr_kd"


def test_a_wheel_has_every_recipe_with_what_it_names_and_nothing_else(built: Path) -> None:
    shipped = built / "shipped"
    here = {file.parent.name for file in ROOT.glob("pipelines/*/pipeline.yaml")}
    assert {file.name for file in (shipped / "pipelines").iterdir()} == here
    for file in shipped.glob("pipelines/*/*.yaml"):
        for named in re.findall(r"(?:file: |--source, )([\w/.]+)", file.read_text()):
            assert (shipped / named).exists(), f"{file}: {named}"
    files = {file.relative_to(shipped) for file in shipped.rglob("*") if file.is_file()}
    assert {file.suffix for file in files} == {".py", ".yaml", ".md", ".json", ".tar", ".sh", ".sbatch"}
    assert all((ROOT / file).read_bytes() == (shipped / file).read_bytes() for file in files if file.suffix != ".md")


def test_links_in_a_wheel_lead_somewhere(built: Path) -> None:
    pages = [*built.rglob("*.md")]
    links = {page: re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text()) for page in pages}
    assert not (
        lost := [(page, link) for page in pages for link in links[page] if not (page.parent / link).exists()]
    ), lost
    told = links[built / "config" / "README.md"]
    assert "../shipped/pipelines/million_hours/README.md" in told and not any("generated" in link for link in told)


def test_the_recordings_keep_their_licence(built: Path) -> None:
    folder = built / "shipped" / "data_manifests" / "digits"
    assert (
        "CC-BY-SA-4.0" in (folder / "LICENSE.md").read_text() and "Zohar Jackson" in (folder / "README.md").read_text()
    )


def test_a_package_finds_its_own(built: Path) -> None:
    code = "from asr_kd import recipes; print(recipes.HOME, *recipes.recipes())"
    found = subprocess.run([sys.executable, "-c", code], cwd=built.parent, capture_output=True, text=True, check=True)
    home, *names = found.stdout.split()
    assert Path(home).samefile(built / "shipped")
    assert {"digits", "own_audio", "pretrained/text.yaml"} <= set(names) and names == list(recipes.recipes())


def test_where_it_lies_changes_nothing(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what was made with a clone need not be made again with a wheel."""
    monkeypatch.chdir(ROOT)
    clone = [stage.fingerprint for stage in load_pipeline(Path("pipelines/digits/pipeline.yaml"), [])[1]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "HOME", built / "shipped")
    _, stages = load_pipeline(recipes.recipes()["digits"], [])
    assert [stage.fingerprint for stage in stages] == clone
    script, (_, source) = stages[0].settings["file"], stages[0].settings["arguments"]
    assert Path(script).is_relative_to(built) and Path(source).is_relative_to(built) and Path(source).is_dir()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with one small recipe; the working folder is empty."""
    folder = tmp_path / "home"
    (folder / "pipelines" / "tiny").mkdir(parents=True)
    (folder / "pipelines" / "tiny" / "pipeline.yaml").write_text(PIPELINE)
    (folder / "pipelines" / "tiny" / "copy.py").write_text(SCRIPT)
    (folder / "data_manifests").mkdir()
    (folder / "data_manifests" / "words.txt").write_text("one two")
    monkeypatch.setattr(recipes, "HOME", folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `asr-kd run`; what it printed."""

    def run(*words: str, status: int = 0) -> str:
        assert cli.main(["run", *words]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def test_a_recipe_runs_by_its_name(home: Path, run: Run) -> None:
    file = home / "pipelines" / "tiny" / "pipeline.yaml"
    assert run("tiny", "--dry-run").splitlines()[0] == f"recipe tiny: {file}"
    assert "done: copy" in run("tiny") and Path("out/copy.txt").read_text() == "one two"
    assert "unchanged" in run("tiny")
    assert "done: copy" in run("tiny", "more=yes")
    (home / "data_manifests" / "words.txt").write_text("three")
    assert "done: copy" in run("tiny", "more=yes") and Path("out/copy.txt").read_text() == "three"


def test_a_recipe_takes_what_came_with_it_and_a_changed_copy_what_is_here_first(home: Path, run: Run) -> None:
    Path("data_manifests").mkdir()
    Path("data_manifests/words.txt").write_text("mine")
    run("tiny")
    assert Path("out/copy.txt").read_text() == "one two"
    Path("own.yaml").write_text(PIPELINE.replace("run: out", "run: mine"))
    assert f"from {home / 'pipelines/tiny/copy.py'}" in run("own.yaml")
    assert Path("mine/copy.txt").read_text() == "mine"


def test_what_lies_here_is_meant_before_a_recipe(home: Path, run: Run) -> None:
    shutil.copytree(home / "pipelines" / "tiny", "tiny")
    assert "recipe" not in run("tiny", "--dry-run")
    Path("tiny/pipeline.yaml").unlink()
    assert "tiny/pipeline.yaml" in run("tiny", status=2)


def test_a_copy_lies_where_it_does_in_a_clone(home: Path, run: Run) -> None:
    (home / "pipelines" / "tiny" / "__pycache__").mkdir()
    folder = Path("pipelines/tiny")
    assert run("tiny", "--copy") == f"{folder}: a copy of the recipe, to be changed; asr-kd run {folder} runs it\n"
    assert sorted(one.name for one in folder.iterdir()) == ["copy.py", "pipeline.yaml"]
    assert not Path("out").exists() and not Path("pipelines/summary.json").exists()
    (folder / "copy.py").write_text(SCRIPT.replace("from", "mine"))
    assert f"mine {folder.absolute() / 'copy.py'}" in run("pipelines/tiny")
    assert "pipelines/tiny: is there already" in run("tiny", "--copy", status=2)
    assert "those are tiny" in run("tinny", "--copy", status=2)
    for more in ("more=yes", "--dry-run"):
        assert "--copy takes the name of a recipe" in run("tiny", "--copy", more, status=2)


def test_a_copy_says_what_it_wants(home: Path, run: Run) -> None:
    folder = home / "pipelines" / "tiny"
    (folder / "README.md").write_text("# tiny")
    assert run("tiny", "--copy").endswith("asr-kd run pipelines/tiny runs it; README.md there says what it needs\n")
    shutil.rmtree("pipelines")
    stages = "\n".join(
        f'  {name}: {{verb: prepare, settings: {{manifest: "${{{name}}}", output: "${{run}}/{name}"}}}}'
        for name in ("test", "labelled")
    )
    (folder / "pipeline.yaml").write_text(
        f"variables: {{run: out, labelled: a.jsonl, test: b.jsonl}}\nstages:\n{stages}\n"
    )
    assert run("tiny", "--copy").endswith("asr-kd run pipelines/tiny labelled=… test=… runs it\n")


def test_a_name_of_nothing_is_answered_with_the_names(home: Path, run: Run) -> None:
    (home / "pipelines" / "tiny" / "other.yaml").write_text(PIPELINE)
    (home / "pipelines" / "changes").mkdir()
    (home / "pipelines" / "changes" / "arms.yaml").write_text("a: 1")
    said = run("tinny", status=2)
    assert said == (
        "asr-kd run: tinny: neither a file or folder here nor a recipe that comes with asr-kd; those are tiny, tiny/other.yaml\n"
    )
