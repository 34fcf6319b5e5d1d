"""The comparison of methods: arms and their pipeline, what is left out of it, paired figures, and the quiet readouts."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.load import build
from asr_kd.distillation.spikes import AFTER_MS, BEFORE_MS, find_spikes
from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.pipeline import load_pipeline
from asr_kd.training.settings import TrainSettings
from asr_kd.units import Units
from tests.training.conftest import FEATURES, audio, development, job, letters, targets, units

__all__ = ["audio", "development", "job", "letters", "targets", "units"]
ROOT = Path(__file__).parents[2]
NARROW = ("narrow", "privileged", "narrow-oracle", "narrow-alone")


@pytest.fixture(scope="module")
def script() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "pipelines" / "taxonomy"))
        names = ("arms", "plans", "costs", "readouts", "tables", "measure")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def made(script: SimpleNamespace, task: str) -> dict[str, Any]:
    """The stages of a task with every arm and value that the settings take."""
    arms = [arm for arm in script.arms.read_arms().values() if task in arm.tasks]
    arms = [arm for arm in arms if not script.arms.refusal(task, arm, {})]
    return dict(script.arms.stages_of(task, 0, [(arm, value) for arm in arms for value in arm.values], {}))


def heard(settings: dict[str, Any], shares: dict[str, float]) -> Counter[str]:
    """Times that each set of audio is read; of a source that takes a list, with the share of the audio that this keeps."""
    times: Counter[str] = Counter()
    for phase in settings["phases"]:
        for source in phase["sources"]:
            times[source["audio"]] += phase["passes"] * source.get("repeat", 1) * shares.get(source.get("only"), 1)
    return times


@pytest.mark.parametrize("task", ["strong", "weak", "grammar", "real"])
def test_pipelines_are_sound_and_all_arms_hear_the_same(
    at_root: None, script: SimpleNamespace, tmp_path: Path, task: str
) -> None:
    stages = made(script, task)
    pipeline = {"variables": {"run": str(tmp_path), "jobs": 2}, "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    _, loaded = load_pipeline(tmp_path / "pipeline.yaml", [])
    assert len({stage.fingerprint for stage in loaded}) == len({stage.output for stage in loaded}) == len(stages) > 40
    needs = {stage.name: stage.needs for stage in loaded}
    assert {f"{task}-0-soft-targets", f"{task}-0-student-supervised"} < set(needs[f"{task}-0-student-soft"])
    assert f"{task}-0-student-supervised" not in needs[f"{task}-0-student-soft-fresh"]
    students = [
        stage["settings"]
        for name, stage in stages.items()
        if f"{task}-0-student-" in name and not name.endswith("supervised")
    ]
    choices = [stage["settings"] for stage in stages.values() if stage["verb"] == "select"]
    shares = {one["output"]: one["share"] for one in choices}
    of_all, *others = [heard(one, shares) for one in students if not one["output"].endswith(("-75", "-alone"))]
    assert len(others) > 20 and all(other == of_all for other in others)
    # no whole number of passes hears three quarters as often as all
    best, chance = [heard(one, shares) for one in students if one["output"].endswith("-75")]
    assert best == chance and len(choices) == 6
    unlabelled = students[0]["phases"][0]["sources"][0]["audio"]
    assert best[unlabelled] == pytest.approx(of_all[unlabelled], rel=0.05)
    other = script.arms.stages_of(task, 1, [(script.arms.Arm("soft"), None)], {})
    assert other[f"{task}-1-student-soft"]["settings"]["seed"] == 1
    shared = [name for name in other if name in stages]
    assert shared and all(other[name] == stages[name] for name in shared)  # the data


def test_assistants_learn_from_each_other_in_turn(at_root: None, script: SimpleNamespace, tmp_path: Path) -> None:
    stages = made(script, "strong")
    pipeline = {"variables": {"run": str(tmp_path), "jobs": 2}, "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    _, loaded = load_pipeline(tmp_path / "pipeline.yaml", [])
    found = {stage.name.removeprefix("strong-0-"): stage for stage in loaded}
    chains = {
        "student-assistant-size": ["soft-targets-size", "assistant-size", "soft-targets", "teacher"],
        "student-assistant-context": [
            "soft-targets-delay-8", "assistant-delay-8", "soft-targets-delay-16", "assistant-delay-16", "soft-targets", "teacher",
        ],
    }  # fmt: skip
    student = found["student-soft"].settings
    for name, chain in chains.items():
        for one, before in itertools.pairwise([name, *chain]):
            assert f"strong-0-{before}" in found[one].needs
        assert "strong-0-soft-targets" not in found[name].needs
        assistants = [found[one].settings for one in chain if one.startswith("assistant")]
        for settings in assistants:
            phase = build(TrainSettings, settings, name).phases[0]
            assert phase.passes == student["phases"][0]["passes"]
            assert settings["init"] == (
                student["init"] if settings["model"]["kind"] == student["model"]["kind"] else None
            )
            assert settings["batch_frames"] == student["batch_frames"]
    delays = [found[f"assistant-delay-{delay}"].settings["model"] for delay in (16, 8)]
    assert [{**one, "delay_frames": 4} for one in delays] == [student["model"]] * 2


def test_a_narrow_student_differs_from_its_baseline_in_who_teaches_it(at_root: None, script: SimpleNamespace) -> None:
    stages, arms = made(script, "strong"), script.arms.read_arms()
    found = {name: stages[f"strong-0-student-{name}"]["settings"] for name in ("soft", *NARROW)}
    narrow = found["narrow"]
    for name in NARROW:
        settings = build(TrainSettings, found[name], name)
        assert settings.features == FeatureSettings(sample_rate=4000, mels=45)
        assert settings.features.frame_ms == build(TrainSettings, found["soft"], "soft").features.frame_ms
        first, labelled = found[name]["phases"][0]["sources"]
        assert {**found[name], "phases": 0, "output": 0} == {**narrow, "phases": 0, "output": 0}
        assert (
            labelled == narrow["phases"][0]["sources"][1]
            and first["augment"] == narrow["phases"][0]["sources"][0]["augment"]
        )
        assert arms[name].baseline == ("soft" if name == "narrow" else "narrow")
    taught = {name: found[name]["phases"][0]["sources"][0]["targets"] for name in NARROW}
    ends = {name: where and Path(where).name for name, where in taught.items()}
    assert ends == {
        "narrow": "soft-targets-narrow",
        "privileged": "soft-targets",
        "narrow-oracle": None,
        "narrow-alone": None,
    }
    # the narrow teacher is the other one, but for what it hears: its front end, and the alignment of a student that hears as little
    wide, other = stages["strong-0-teacher"]["settings"], stages["strong-0-teacher-narrow"]["settings"]
    as_wide = json.loads(json.dumps(other["phases"]).replace("-narrow", ""))
    assert as_wide == wide["phases"]
    apart = {"phases": 0, "features": 0, "output": 0}
    assert wide | apart == other | apart
    # alone: as much audio, all of it labelled
    times = heard(found["narrow-alone"], {})
    assert list(times) == [found["narrow"]["phases"][0]["sources"][1]["audio"]] and times.total() == 7 * 24


@pytest.mark.parametrize("task", ["strong", "weak", "real"])
def test_a_task_runs_alone_too(at_root: None, task: str) -> None:
    _, stages = load_pipeline(Path(f"pipelines/taxonomy/{task}.yaml"), [])
    assert stages[-1].name == "student" and len(stages) > 6


def test_arms_that_the_settings_refuse_say_why(at_root: None, script: SimpleNamespace) -> None:
    refused = script.arms.refusal("strong", script.arms.Arm("odd", source={"surprise": 1}), {})
    assert "surprise" in refused
    assert script.arms.refusal("strong", script.arms.Arm("plain"), {}) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("soft: {}\na: {sauce: {}}", "sauce is no key of an arm"),
        ("soft: {}\na: {starts: [fresh]}", "no arm soft-fresh"),
        ("soft: {}\na: {grid: {x: [1], y: [2]}}", "grid has 2 settings"),
    ],
)
def test_a_wrong_table_is_refused(script: SimpleNamespace, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "arms.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        script.arms.read_arms(tmp_path / "arms.yaml")


def test_a_value_lands_in_its_place_and_baselines_come_along(at_root: None, script: SimpleNamespace) -> None:
    arms = script.arms.read_arms()
    assert [arm.name for arm in script.arms.with_baselines(arms, ["hint-fresh"])] == [
        "soft",
        "soft-fresh",
        "online-fresh",
        "hint-fresh",
    ]
    stages = script.arms.task_of("strong", 0, {})["stages"]
    settings = script.arms.student_of(stages, arms["hint-fresh"], 3.0)
    source = settings["phases"][0]["sources"][0]
    assert source["features"][0]["weight"] == 3.0 and settings["init"] is None and source["targets"] is None
    assert "weight" not in arms["hint-fresh"].source["features"][0] and stages["student"]["settings"]["init"]
    assert settings["output"] == "${run}/student-hint-fresh-3"
    model = script.arms.student_of(stages, arms["conditioned-fresh"], 0.3)["model"]
    assert model["conditioned"] == [1] and model["size"] == 96
    assert script.arms.student_of(stages, script.arms.Arm("long", passes=99), None)["phases"][0]["passes"] == 99


def test_a_failed_stage_takes_what_needs_it_along(at_root: None, script: SimpleNamespace) -> None:
    arms = script.arms.read_arms()
    chosen = [(arms[name], arms[name].values[0]) for name in ("soft", "spikes", "generation", "lists")]
    stages = script.arms.stages_of("strong", 0, chosen, {}, [arm.stage(value) for arm, value in chosen])
    left = script.measure.without(stages, "strong-0-student-soft")
    gone = {"strong-0-student-soft", "strong-0-soft-targets-generation", "strong-0-student-generation"}
    assert set(stages) - set(left) == gone
    systems = left["strong-0-report"]["settings"]["systems"]
    assert set(systems) == {"teacher", "student-supervised", "student-spikes-0.3", "student-lists"}
    plan = script.plans.Plan("strong", [arm for arm, _ in chosen], range(1), range(1), Path("x"), {})
    assert [arm.name for arm in script.measure.working([plan], gone)[0].arms] == ["spikes", "lists"]
    assert script.measure.without(stages, "strong-data") == {}


def test_a_failed_stage_does_not_stop_the_others(
    script: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts as stages: one fails, one reads what it would have written, one works."""
    (tmp_path / "good.py").write_text("import sys; open(sys.argv[2], 'w').close()")
    (tmp_path / "bad.py").write_text("raise SystemExit('no luck')")

    def stage(file: str, output: str, *more: str) -> dict[str, Any]:
        return {
            "verb": "script",
            "settings": {"file": str(tmp_path / file), "output": "${run}/" + output, "arguments": [*more]},
        }

    stages = {"bad": stage("bad.py", "a"), "after": stage("good.py", "b", "${run}/a"), "good": stage("good.py", "c")}
    assert script.measure.run_stages(tmp_path / "run", stages, 1) == {"bad", "after"}
    assert (tmp_path / "run" / "c").exists() and not (tmp_path / "run" / "b").exists()
    assert "stage bad failed (no luck)" in capsys.readouterr().err


def test_values_are_chosen_on_development(script: SimpleNamespace, tmp_path: Path) -> None:
    arm = script.arms.Arm("x", key="soft", values=[0.1, 1.0, 3.0])
    plan = script.plans.Plan("strong", [arm], range(3), range(2), tmp_path, {})
    scores = {0.1: [(0.2, 0.1), (0.4, 0.1)], 1.0: [(0.3, 0.2), (0.1, 0.2)], 3.0: [(0.2, 0.1), (0.2, 0.1)]}
    for value, seeds in scores.items():
        for seed, (wer, loss) in enumerate(seeds):
            best = plan.run(seed) / arm.stage(value) / "best"
            best.mkdir(parents=True)
            training = {"development_wer": wer, "development_loss": loss}
            (best / "checkpoint.json").write_text(json.dumps({"training": training}))
    assert plan.value(arm) == 3.0  # as good as 1.0 in words, better in loss
    assert plan.development(arm, 0.1) == pytest.approx((0.3, 0.1))


def test_paired_differences(script: SimpleNamespace) -> None:
    mean, half = script.tables.paired([0.05, 0.06, 0.04], [0.06, 0.08, 0.07])
    assert mean == pytest.approx(-0.02) and half == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert script.tables.paired([0.05], [0.06]) == (pytest.approx(-0.01), None)
    assert script.tables.verdict(mean, half, 0.07) == "null: excludes more than 64 % better or 7 % worse"
    assert script.tables.verdict(-0.02, 0.01, 0.1) == "better by 10 to 30 %"
    assert script.tables.verdict(0.02, 0.01, 0.1) == "worse by 10 to 30 %"
    assert script.tables.verdict(0.02, None, 0.1) == "one seed"


def test_dearer_arms_get_a_baseline_of_the_same_time(at_root: None, script: SimpleNamespace, tmp_path: Path) -> None:
    arms = script.arms.read_arms()
    chosen = [arms[name] for name in ("soft", "online", "lists")]
    plan = script.plans.Plan("strong", chosen, range(1), range(1), tmp_path, {})
    costs = {arm.name: {"ratio": 2.0 if arm.name.startswith("online") else 1.0} for arm in chosen}
    longer = script.measure.longer(plan, costs)
    assert set(longer) == {"online"} and longer["online"].name == "soft-48-passes" and longer["online"].passes == 48
    assert longer["online"].source == arms["soft"].source


def posteriors(*paths: str) -> list[torch.Tensor]:
    """Sure answers, float64 [frames, units], a letter a frame: - is the blank, a and b are units."""
    rows = [torch.tensor(["-ab".index(letter) for letter in path]) for path in paths]
    return [torch.nn.functional.one_hot(row, 3).double().mul(0.97).add(0.01).log() for row in rows]


def test_fidelity_of_the_same_and_of_a_later_student(script: SimpleNamespace) -> None:
    teacher = posteriors("--a--b---b--", "-a---a--")
    same = script.readouts.fidelity(teacher, teacher, 30)
    assert same == {"frame_kl": pytest.approx(0.0, abs=1e-12), "spike_kl": 0.0, "agreement": 1.0}
    later = script.readouts.fidelity(teacher, posteriors("---a--b---b-", "--a---a-"), 30)
    other = script.readouts.fidelity(teacher, posteriors("--b--a---b--", "-a---a--"), 30)
    assert later["frame_kl"] > 1.0 and later["agreement"] == 1.0
    assert later["spike_kl"] < 0.1 * other["spike_kl"] and other["agreement"] == pytest.approx(3 / 5)
    silent = script.readouts.fidelity(posteriors("-----"), posteriors("-----"), 30)
    assert silent == {"frame_kl": pytest.approx(0.0, abs=1e-12), "spike_kl": 0.0, "agreement": 1.0}


def test_fidelity_against_a_loop(script: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    lengths = [9, 14]
    teacher, student = (
        [torch.from_numpy(3 * rng.standard_normal((length, 4))).log_softmax(1) for length in lengths] for _ in range(2)
    )
    found = script.readouts.fidelity(teacher, student, 30)
    terms = [
        math.exp(float(q)) * float(q - p)
        for one, other in zip(teacher, student, strict=True)
        for theirs, own in zip(one, other, strict=True)
        for q, p in zip(theirs, own, strict=True)
    ]
    assert found["frame_kl"] == pytest.approx(sum(terms) / sum(lengths))
    said, path = torch.cat(teacher), torch.cat(student).argmax(1).tolist()
    probs, units = said.exp().sort(1, descending=True)
    spikes = find_spikes(units, probs, torch.tensor(lengths), round(BEFORE_MS / 30), round(AFTER_MS / 30))
    same = 0
    for start, end, first, last in spikes.edges.T.tolist():
        wanted = 1 + int(said[start:end, 1:].exp().sum(0).argmax())
        spoken = [
            unit
            for place, unit in enumerate(path[first:last])
            if unit and (not place or path[first + place - 1] != unit)
        ]
        same += spoken == [wanted]
    assert found["agreement"] == same / len(spikes.start)


def test_fidelity_is_measured_once(
    script: SimpleNamespace, units: Units, development: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings(size=4, layers=1)
    for seed, name in enumerate(("teacher", "student-soft", "student-pseudo")):
        torch.manual_seed(seed)
        model = build_model(settings, FEATURES.dimension, units.size)
        save_checkpoint(tmp_path / name, model, units, FEATURES, settings, {})
    found = script.readouts.read_fidelity(tmp_path, ["student-soft"], Path(development))
    assert set(found["student-soft"]) == {"frame_kl", "spike_kl", "agreement"} and found["student-soft"]["frame_kl"] > 0
    measured: list[Any] = []
    whole = script.readouts.fidelity
    monkeypatch.setattr(script.readouts, "fidelity", lambda *given: measured.append(given) or whole(*given))
    again = script.readouts.read_fidelity(tmp_path, ["student-soft", "student-pseudo"], Path(development))
    assert len(measured) == 1 and again["student-soft"] == found["student-soft"]


def test_a_student_that_hears_less_is_measured_by_what_it_hears(
    script: SimpleNamespace, units: Units, development: str, tmp_path: Path
) -> None:
    narrow = FEATURES.model_copy(update={"sample_rate": 4000})
    for seed, (name, features) in enumerate(
        {"teacher": FEATURES, "student-soft": FEATURES, "student-narrow": narrow}.items()
    ):
        torch.manual_seed(seed)
        settings = ModelSettings(size=4, layers=1)
        model = build_model(settings, features.dimension, units.size)
        save_checkpoint(tmp_path / name, model, units, features, settings, {})
    both = script.readouts.read_fidelity(tmp_path, ["student-soft", "student-narrow"], Path(development))
    assert both["student-soft"]["frame_kl"] > 0 and both["student-narrow"]["frame_kl"] > 0
    rows = posteriors("--a--b---b--", "-a---a--")
    shorter = script.readouts.fidelity(rows, [rows[0], rows[1][:-1]], 30)
    assert shorter == {"frame_kl": pytest.approx(0.0, abs=1e-12), "spike_kl": 0.0, "agreement": 1.0}


def test_steps_to_a_word_error_rate(script: SimpleNamespace, tmp_path: Path) -> None:
    rows = [{"step": 0, "development_wer": 0.01}, {"step": 10, "loss": 1.0}, {"step": 50, "development_wer": 0.2}, {"step": 100, "development_wer": 0.1}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script.readouts.steps_to(tmp_path / "metrics.jsonl", 0.1) == 100
    assert script.readouts.steps_to(tmp_path / "metrics.jsonl", 0.05) is None  # the start does not count


def test_churn(script: SimpleNamespace, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, words in ((one, ["one two", "three"]), (other, ["one too", "three four"])):
        folder.mkdir()
        rows = [
            {"system": "x", "key": str(key), "hypothesis_scored": said, "words": 2} for key, said in enumerate(words)
        ]
        (folder / "utterances.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [script.readouts.hypotheses(folder)["x"] for folder in (one, other)]
    assert script.readouts.churn(said) == 0.5 and script.readouts.churn(said[:1]) is None
    assert script.readouts.churn([said[0], said[0], said[1]]) == pytest.approx(1 / 3)


def test_costs_are_measured_once(
    script: SimpleNamespace, job: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft = job(ema_decay=0.9).model_dump()
    average = job(ema_decay=0.9, source={"targets": None, "teacher": "average"}).model_dump()
    monkeypatch.setattr(script.costs, "STEPS", 2)
    file = tmp_path / "costs.json"
    found = script.costs.measure_costs(file, {"soft": soft}, "soft")
    assert found["soft"]["ratio"] == 1.0 and found["soft"]["memory"] > 50e6
    monkeypatch.setattr(script.costs, "peak_memory", lambda settings: 1)
    both = script.costs.measure_costs(file, {"soft": soft, "average": average}, "soft")
    assert both["soft"] == found["soft"] and both["average"]["memory"] == 1 and both["average"]["ratio"] > 0
