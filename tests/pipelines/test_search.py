"""The search for small students: its space, its promises after an interruption, what it finds where the answer is known, and its tables."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from asr_kd.errors import UserError
from asr_kd.pipeline import load_pipeline
from tests.pipelines.test_taxonomy_whole import in_this_process, tiny
from tests.training.conftest import audio, development

__all__ = ["audio", "development"]
ROOT = Path(__file__).parents[2]
SPACE = {
    "lstm": {"layers": [1, 2, 3], "size": [16, 32, 64, 96], "delay_frames": [4], "learning_rate": [0.001, 0.003]},
    "separable": {"layers": [2, 4], "size": [32, 64], "kernel": [5, 9], "learning_rate": [0.003]},
}


@pytest.fixture(scope="module")
def script() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec = importlib.util.spec_from_file_location("search_measure", ROOT / "pipelines" / "search" / "measure.py")
        assert spec and spec.loader
        measure = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "search_measure", measure)
        spec.loader.exec_module(measure)
        yield SimpleNamespace(measure=measure, **{name: importlib.import_module(name) for name in ("search", "space")})


@pytest.fixture
def optuna(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Only where the extra is installed; `pip install -r requirements-dev.lock` does it. No test waits for a disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    return pytest.importorskip("optuna", reason="the extra search is not installed")


def size_of(student: Any) -> float:
    """A made-up number of parameters."""
    return float(student.model.layers * student.model.size**2)


def costs_of(student: Any) -> dict[str, float]:
    return {"parameters": size_of(student), "real_time_factor": student.model.layers / 1000}


def wer_of(student: Any, passes: int) -> float:
    """Larger students make fewer errors, down to a floor; fewer passes and the wrong rate make more; a kind is no good."""
    bad = 0.2 * (student.model.kind == "separable") + 0.05 * (student.rate != 0.003)
    return 0.04 + 40 / (400 + size_of(student)) + 0.3 / passes + bad


class Trainer:
    """Stands in for trainings: remembers what was asked of it, and may die."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.dies_at = dies_at

    def __call__(self, wanted: Sequence[tuple[Any, int]]) -> list[float]:
        if self.dies_at is not None and len(self.asked) >= self.dies_at:
            raise KeyboardInterrupt
        self.asked += [(student.name, passes) for student, passes in wanted]
        return [wer_of(student, passes) for student, passes in wanted]


def goal(script: SimpleNamespace, **changes: Any) -> Any:
    standard = script.space.candidate("lstm", {"layers": 2, "size": 96, "delay_frames": 4, "learning_rate": 0.003})
    rungs = script.search.rungs_of(27, 3, 3)
    values: dict[str, Any] = {
        "by": "parameters", "within": 0.07, "limits": {}, "rungs": rungs, "factor": 3,
        "standard": [wer_of(standard, passes) for passes in rungs], "standard_cost": size_of(standard),
    }  # fmt: skip
    return script.search.Goal(**values | changes)


def run(script: SimpleNamespace, journal: Path, method: str = "halving", train: Any = None, **changes: Any) -> Any:
    budget, seed, space = changes.pop("budget", 10), changes.pop("seed", 0), changes.pop("space", SPACE)
    trainer = train or Trainer()
    search = script.search.Search(method, space, goal(script, **changes), costs_of, trainer, budget * 27, journal, seed)
    return search.run()


def told(tried: Sequence[Any]) -> list[tuple[str, dict[int, float]]]:
    return [(one.student.name, dict(one.wers)) for one in tried]


def test_the_recipe_s_space_and_a_grid_of_it(script: SimpleNamespace) -> None:
    space = script.space.read_space(ROOT / "pipelines" / "search" / "space.yaml")
    made = [
        script.space.candidate(kind, values)
        for kind, settings in space.items()
        for values in script.space.combinations(settings)
    ]
    names = [one.name for one in made if one]
    assert len(set(names)) == len(names) > 100 and None in made  # a projection as wide as its layer
    for points in (1, 2, 4, 16, 40, 10**6):
        grid = script.space.grid(space, points)
        students = [script.space.candidate(kind, values) for kind, values in grid]
        assert 0 < len(grid) <= points and None not in students and len({one.name for one in students}) == len(grid)
    assert len(grid) == len(names)
    assert len(script.space.grid(space, 16)) > 8  # the default budget is not left over
    sizes = {values["size"] for kind, values in script.space.grid(space, 40) if kind == "lstm"}
    assert {min(space["lstm"]["size"]), max(space["lstm"]["size"])} <= sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lstm: {layers: [1]}", "lstm has no learning_rate"),
        ("lstm: 3", "lstm has no learning_rate"),
        ("lstm: {layers: 2, learning_rate: [0.1]}", "lstm: layers is 2; give a list"),
        ("lstm: {layers: [1, 1], learning_rate: [0.1]}", "a list of different numbers"),
        ("lstm: {layers: [[1]], learning_rate: [0.1]}", "a list of different numbers"),
        ("lstn: {layers: [1], learning_rate: [0.1]}", "lstn does not stream"),
        ("lstm: {size: [8], projection: [9], learning_rate: [0.1]}", "projection must be below size"),
        ("lstm: {sise: [8], learning_rate: [0.1]}", "sise"),
        ("lstm: {layers: [1], learning_rate: 0.1}", "lstm has no learning_rate"),
        ("lstm: {layers: [1], learning_rate: [-1]}", "give rates above 0"),
        ("blstm: {layers: [1], learning_rate: [0.1]}", "blstm does not stream"),
    ],
)
def test_a_wrong_space_is_refused(script: SimpleNamespace, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        script.space.read_space(tmp_path / "space.yaml")


def test_passes_of_the_rungs(script: SimpleNamespace) -> None:
    assert script.search.rungs_of(24, 3, 3) == [3, 8, 24]
    assert script.search.rungs_of(2, 3, 3) == [1, 2] and script.search.rungs_of(24, 2, 1) == [24]


def test_what_is_minimised(script: SimpleNamespace) -> None:
    asked = goal(script, standard=[0.4, 0.2, 0.1], within=0.12, standard_cost=100.0)
    assert (
        asked.value(100.0, 0.12, 2) == 0.0 == asked.value(100.0, 0.48, 0)
    )  # the standard has four times as many errors there
    assert asked.value(50.0, 0.02, 2) == pytest.approx(-math.log(2))
    assert asked.value(50.0, 0.132, 2) == pytest.approx(-math.log(2) + 0.1 * script.search.PENALTY)
    assert goal(script, standard=[0.0] * 3).value(1.0, 0.5, 0) > 0


def test_each_method_finds_the_smallest(script: SimpleNamespace, optuna: ModuleType, tmp_path: Path) -> None:
    every = [
        made
        for kind, settings in SPACE.items()
        for values in script.space.combinations(settings)
        if (made := script.space.candidate(kind, values))
    ]
    best = min(size_of(one) for one in every if wer_of(one, 27) <= 0.07)
    for method in script.search.METHODS:
        trainer = Trainer()
        tried = run(script, tmp_path / "journal", method, trainer, budget=len(every))
        found = script.search.winner(tried, goal(script), costs_of)
        assert size_of(found.student) == best, method
        assert found.wers[27] <= 0.07 and len(trainer.asked) == len(set(trainer.asked))  # nothing twice
        if method != "halving":
            assert {tuple(one.wers) for one in tried} == {(27,)}
    assert script.search.winner(tried, goal(script, within=0.01), costs_of) is None


def test_budget_limits_and_halving(
    script: SimpleNamespace, optuna: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.search, "STALE", 20)
    trainer = Trainer()
    tried = run(
        script, tmp_path / "journal", "halving", trainer, limits={"parameters": 10_000, "real_time_factor": 0.002}
    )
    spent = sum(passes for _, passes in trainer.asked)
    assert 270 <= spent < 270 + 2 * sum(goal(script).rungs)
    assert all(size_of(one.student) <= 10_000 and one.student.model.layers <= 2 for one in tried)
    counts = [sum(passes in one.wers for one in tried) for passes in (3, 9, 27)]
    assert counts[0] > counts[1] > counts[2] > 0
    assert all(set(one.wers) in ({3}, {3, 9}, {3, 9, 27}) for one in tried)
    # a larger budget goes on where the smaller one ended
    more = run(
        script,
        tmp_path / "journal",
        "halving",
        Trainer(),
        budget=14,
        limits={"parameters": 10_000, "real_time_factor": 0.002},
    )
    assert told(more)[: len(tried) - 2] == told(tried)[:-2] and len(more) >= len(tried)
    chance = Trainer()
    run(script, tmp_path / "journal", "random", chance)
    assert 270 <= sum(passes for _, passes in chance.asked) <= 270 + 27
    nothing = run(script, tmp_path / "journal", "halving", Trainer(), limits={"parameters": 1})
    assert nothing == []


def test_a_seed_gives_the_same_students(script: SimpleNamespace, optuna: ModuleType, tmp_path: Path) -> None:
    one, same, other = (told(run(script, tmp_path / str(number), seed=seed)) for number, seed in enumerate((0, 0, 1)))
    assert one == same != other


@pytest.mark.parametrize("method", ["halving", "random", "grid"])
def test_killed_anywhere_it_ends_in_the_same(
    script: SimpleNamespace, optuna: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """In trainings, and before or behind any word that goes into the journal."""
    whole = told(run(script, tmp_path / "whole", method, budget=3))
    for number in (0, 3, 6):
        with contextlib.suppress(KeyboardInterrupt):
            run(script, tmp_path / f"training{number}", method, Trainer(dies_at=number), budget=3)
        assert told(run(script, tmp_path / f"training{number}", method, budget=3)) == whole
    backend = importlib.import_module("optuna.storages.journal").JournalFileBackend
    real = backend.append_logs
    for at, before in zip((1, 3, 6, 9, 12, 17, 22, 27), itertools.cycle((True, False))):
        left = iter(range(at))

        def dying(self: Any, logs: Any, left: Iterator[int] = left, before: bool = before) -> None:
            last = next(left, None) is None
            if not (last and before):
                real(self, logs)
            if last:
                raise KeyboardInterrupt

        journal = tmp_path / f"journal{at}{before}"
        monkeypatch.setattr(backend, "append_logs", dying)
        with contextlib.suppress(KeyboardInterrupt):
            run(script, journal, method, budget=3)
        monkeypatch.setattr(backend, "append_logs", real)
        assert told(run(script, journal, method, budget=3)) == whole, (at, before)


def test_without_optuna(script: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs the extra search; .*asr-kd\[search\]"):
        run(script, tmp_path / "journal")


def test_front(script: SimpleNamespace) -> None:
    assert script.search.front([(3, 0.1), (1, 0.5), (2, 0.5), (2, 0.2), (4, 0.1), (5, 0.05)]) == [
        (1, 0.5), (2, 0.2), (3, 0.1), (5, 0.05),
    ]  # fmt: skip
    assert script.search.front([]) == []


def test_rank_correlation(script: SimpleNamespace) -> None:
    of: Callable[..., Any] = script.search.rank_correlation
    assert of([1, 2, 5], [10, 20, 21]) == pytest.approx(1.0) and of([1, 2, 5], [3, 2, 1]) == pytest.approx(-1.0)
    one, other = [5, 3, 8, 1, 9, 4], [2, 1, 6, 3, 5, 4]
    squares = sum((sorted(one).index(a) - sorted(other).index(b)) ** 2 for a, b in zip(one, other, strict=True))
    assert of(one, other) == pytest.approx(1 - 6 * squares / (6 * 35))  # without ties
    assert of([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)  # ties: ranks 1.5, 1.5, 3
    assert of([1, 1, 1], [1, 2, 3]) is None and of([1, 2], [1, 2]) is None


def test_trainings_are_those_of_the_task(
    script: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    lab = script.measure.Lab(tmp_path, {}, 1)
    students = [script.space.candidate(kind, next(script.space.combinations(SPACE[kind]))) for kind in SPACE]
    stages = lab.stages([(student, passes) for student in students for passes in (3, 24)], 1)
    pipeline = {"variables": {"run": str(tmp_path), "jobs": 1}, "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    _, loaded = load_pipeline(tmp_path / "pipeline.yaml", [])
    found = {stage.name: stage for stage in loaded}
    like = lab.settings(1)
    for student, passes in itertools.product(students, (3, 24)):
        stage = found[f"strong-1-search-{student.name}-{passes}-passes"]
        phase = stage.settings["phases"][0]
        assert (phase["passes"], phase["learning_rate"]) == (passes, student.rate)
        start = f"strong-1-search-{student.name}-start"
        assert {"strong-1-soft-targets", start} <= set(stage.needs) and stage.settings["seed"] == 1
        assert stage.settings["init"] == found[start].settings["output"]
        assert all(one.settings["model"] == student.model.model_dump() for one in (stage, found[start]))
        assert like["model"]["size"] == 96
        assert [one["audio"].rpartition("/")[2] for one in phase["sources"]] == ["unlabelled-quarter", "labelled"]


def test_from_the_command_to_the_tables(
    script: SimpleNamespace,
    optuna: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    lab = script.measure.Lab
    tested: list[Any] = []

    def test(self: Any, students: Any, passes: int, seeds: range) -> list[dict[str, Any]]:
        tested.append(dict(students))
        return [
            {"teacher": {"wer": 0.01, "parameters": 9}, **{name: {"wer": wer_of(one, 24) + 0.001 * seed, "parameters": 7} for name, one in students.items()}}
            for seed in seeds
        ]  # fmt: skip

    monkeypatch.setattr(lab, "train", lambda self, wanted, seed=0, needed=False: Trainer()(wanted))
    monkeypatch.setattr(lab, "costs", lambda self, student: costs_of(student))
    monkeypatch.setattr(lab, "test", test)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    command = [
        "measure.py",
        "--output",
        str(tmp_path),
        "--space",
        str(tmp_path / "space.yaml"),
        "--within",
        "0.08",
        "--budget",
        "8",
    ]
    monkeypatch.setattr("sys.argv", command)
    script.measure.main()
    said = capsys.readouterr().out
    tables = [part.splitlines() for part in said.split("\n\n") if part.strip().startswith("|")]
    searches, proxies, scores = (
        [line.strip("| ").split(" | ") for line in table if "---" not in line] for table in tables
    )
    assert [row[0] for row in searches[1:]] == ["halving", "random", "grid"] and len(
        {len(row) for row in searches}
    ) == 1
    assert [row[0] for row in proxies[1:]] == ["3", "8"] and all(float(row[1]) > 0.9 for row in proxies[1:])
    assert [row[0] for row in scores[1:3]] == ["teacher", "standard"] and len({len(row) for row in scores}) == 1
    assert len(tested) == 1 and (tmp_path / "strong" / "search" / "front-parameters.png").stat().st_size > 5000
    script.measure.main()
    assert capsys.readouterr().out == said  # nothing is proposed again
    monkeypatch.setattr("sys.argv", [*command, "--within", "0.001"])
    script.measure.main()
    assert "nothing was found within it" in capsys.readouterr().out and len(tested) == 2


def test_real_trainings_on_tones(
    script: SimpleNamespace,
    optuna: ModuleType,
    audio: str,
    development: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Small networks, few passes: data, teacher and targets of the task, students that are searched, timed and tested."""
    tiny(tmp_path, audio, development)
    monkeypatch.setattr(importlib.import_module("arms"), "HERE", tmp_path)
    monkeypatch.setattr(importlib.import_module("streaming"), "STREAMED", 50)
    monkeypatch.setattr(script.measure, "run_stages", in_this_process)
    space = {"lstm": {"layers": [1], "size": [6, 8], "learning_rate": [0.01]}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    command = [
        "measure.py",
        "--output",
        str(tmp_path / "runs"),
        "--space",
        str(tmp_path / "space.yaml"),
        "--within",
        "0.99",
    ]
    monkeypatch.setattr(
        "sys.argv",
        [*command, "--budget", "2", "--rungs", "2", "--factor", "2", "--seeds", "1", "--methods", "halving", "grid"],
    )
    script.measure.main()
    run = tmp_path / "runs" / "strong" / "seed0"
    trained = {path.name for path in run.iterdir() if path.name.startswith("search-")}
    assert {"search-standard-1-passes", "search-standard-2-passes", "search-report"} < trained and len(trained) >= 5
    costs = json.loads((tmp_path / "runs" / "strong" / "search" / "costs.json").read_text())
    assert len(costs) == 3 and all(one["parameters"] > 100 and one["real_time_factor"] > 0 for one in costs.values())
    said = capsys.readouterr().out
    assert "| halving | " in said and "front-parameters.png" in said
