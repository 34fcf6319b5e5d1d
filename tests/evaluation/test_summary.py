"""Figures of made-up lines, checked by counting them again."""

from __future__ import annotations

import gc
import itertools
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asr_kd.evaluation.notable import SAMPLES
from asr_kd.evaluation.parts import Costs
from asr_kd.evaluation.score import System
from asr_kd.evaluation.scores import Scores
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.significance import MatchedPairs, marks, segments
from asr_kd.evaluation.summary import summarise
from asr_kd.evaluation.wer import align, character_errors, count_errors, edit_distance
from asr_kd.files import place
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.shards.index import ShardList

Line = dict[str, Any]
COSTS = Costs(seconds=10.0, frontend_seconds=1.0, network_seconds=2.0, decoder_seconds=0.5)


def lines_of(name: str, utterances: int, seed: int) -> list[Line]:
    """Lines of one shard: a teacher and, twice as bad, a student, worse still in noise."""
    rng = random.Random(seed)
    made: dict[str, list[Line]] = {"teacher": [], "student": []}
    for index in range(utterances):
        words = rng.choices("abcdefgh", k=rng.randint(1, 8))
        noisy, seconds = rng.random() < 0.4, rng.uniform(0.5, 12)
        for system, rate in (("teacher", 0.1), ("student", 0.5 if noisy else 0.15)):
            heard = [rng.choice("xyz") if rng.random() < rate else word for word in words if rng.random() > rate / 5]
            reference, hypothesis = " ".join(words), " ".join(heard)
            counts = count_errors(reference, hypothesis)
            late = 0.12 if system == "student" else 0.0
            made[system].append({
                "system": system, "set": name, "shard": "shard-000000.tar", "key": f"{name}{index}",
                "speaker": f"s{rng.randint(0, 5)}", "seconds": seconds,
                "fields": {"condition": "noise" if noisy else "clean", "snr": rng.uniform(-3, 22)},
                "reference": reference, "hypothesis": hypothesis,
                "reference_scored": reference, "hypothesis_scored": hypothesis,
                "words": counts.words, "substitutions": counts.substitutions, "deletions": counts.deletions,
                "insertions": counts.insertions, "errors": counts.errors,
                "characters": character_errors(reference, hypothesis)[0],
                "character_errors": character_errors(reference, hypothesis)[1],
                "times": [[word, at / 2, at / 2 + 0.4 + late, 0.3 if word in "xyz" else 0.9] for at, word in enumerate(heard)],
                "same_as_teacher": False,
            })  # fmt: skip
    for one, other in zip(made["teacher"], made["student"], strict=True):
        other["speaker"], other["fields"] = one["speaker"], one["fields"]
        one["same_as_teacher"], other["same_as_teacher"] = True, one["hypothesis"] == other["hypothesis"]
    return made["teacher"] + made["student"]


LINES = {"home": [lines_of("home", 150, 1), lines_of("home", 60, 2)], "car": [lines_of("car", 90, 3)]}


@pytest.fixture(scope="module")
def report(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return summed_up(checkpoints, LINES, baseline="teacher", teacher="teacher", student="student")


def summed_up(checkpoints: dict[str, Path], lines: dict[str, list[list[Line]]], **changes: Any) -> dict[str, Any]:
    settings = EvalSettings.model_validate(
        {
            "systems": {name: str(path) for name, path in checkpoints.items()},
            "audio": {name: name for name in lines},
            "output": "out",
            "bootstrap": 200,
            **changes,
        }
    )
    scores = Scores(settings)
    for name, shards in lines.items():
        for shard in shards:
            scores.add(name, shard, 100.0, 1)
    device = torch.device("cpu")
    systems = {
        name: System(name, place(path), load_checkpoint(path, device)) for name, path in settings.systems.items()
    }
    index = [{"name": "a.tar", "samples": 1, "seconds": 1.0, "bytes": 1, "sha256": "0" * 64}]
    sets = {name: (name, ShardList.parse(json.dumps(index))) for name in lines}
    return summarise(settings, systems, sets, scores, dict.fromkeys(systems, COSTS), device).model_dump(mode="json")


def every(system: str, *sets: str) -> list[Line]:
    shards = itertools.chain.from_iterable(LINES[one] for one in sets or LINES)
    return [line for shard in shards for line in shard if line["system"] == system]


def rate(lines: list[Line], errors: str = "errors", words: str = "words") -> float:
    return sum(line[errors] for line in lines) / sum(line[words] for line in lines)


def test_it_is_json(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["version"] == 3


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_rates(report: dict[str, Any], name: str) -> None:
    system, mine = report["systems"][name], every(name)
    assert system["wer"] == rate(mine)
    assert system["cer"] == rate(mine, "character_errors", "characters")
    assert system["ser"] == sum(line["errors"] > 0 for line in mine) / 300
    assert system["edit_distance"] == sum(edit_distance(line["reference"], line["hypothesis"]) for line in mine)
    for key in ("interval", "cer_interval"):
        assert system[key][0] < system[key.removesuffix("interval").rstrip("_") or "wer"] < system[key][1]
    by_set = {one: rate(every(name, one)) for one in LINES}
    assert {one: part["wer"] for one, part in system["sets"].items()} == by_set
    assert system["mean_of_sets_wer"] == pytest.approx(sum(by_set.values()) / 2)
    assert sum(part["errors"] for part in system["sets"].values()) == system["errors"]


def test_change_on_each_set(report: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """As a report on that set alone says it of the two systems, paired."""
    for one in LINES:
        change = report["systems"]["student"]["sets"][one]
        wers = [rate(every(name, one)) for name in ("student", "teacher")]
        assert change["change_to_baseline"] == pytest.approx(wers[0] - wers[1])
        low, high = change["change_to_baseline_interval"]
        assert 0 < low < change["change_to_baseline"] < high
        assert report["systems"]["teacher"]["sets"][one]["change_to_baseline"] is None
        alone = summed_up(checkpoints, {one: LINES[one]}, baseline="teacher")
        assert alone["pairs"][0]["interval"] == pytest.approx([-high, -low], abs=0.02)  # speakers in another order
    without = summed_up(checkpoints, LINES)
    assert without["systems"]["student"]["sets"]["car"]["change_to_baseline_interval"] is None


def test_data(report: dict[str, Any]) -> None:
    assert report["data"] | {"hash": ""} == {
        "audio": "home, car", "hash": "", "shards": 2, "utterances": 300, "quarantined": 3, "seconds": 300.0, "speakers": 6,
        "words": sum(line["words"] for line in every("teacher")),
    }  # fmt: skip
    assert (report["sets"]["home"]["utterances"], report["sets"]["home"]["quarantined"]) == (210, 2)
    assert report["bootstrap"]["blocks"] == "speakers"
    assert report["systems"]["student"]["real_time_factor"] == 0.3


def test_pairs(report: dict[str, Any]) -> None:
    (pair,) = report["pairs"]
    tested = MatchedPairs()
    for one, other in zip(every("teacher"), every("student"), strict=True):
        tested.add(
            segments(*(marks(align(line["reference"], line["hypothesis"])) for line in (one, other)))  # type: ignore[arg-type]
        )
    assert (pair["a"], pair["b"], pair["mapsswe"]) == ("teacher", "student", tested.test().model_dump())
    assert pair["mapsswe"]["p"] < 1e-6
    assert pair["difference"] == rate(every("teacher")) - rate(every("student"))
    assert pair["interval"][0] < pair["difference"] < pair["interval"][1] < 0
    assert pair["p_bootstrap"] == pytest.approx(2 / 201)


def test_slices(report: dict[str, Any]) -> None:
    slices = {one["field"]: one for one in report["slices"]}
    assert list(slices) == ["set", "speaker", "seconds", "words_per_second", "condition", "snr"]
    noisy = [line for line in every("student") if line["fields"]["condition"] == "noise"]
    clean, noise = slices["condition"]["values"]
    assert (clean["value"], noise["value"], noise["utterances"]) == ("clean", "noise", len(noisy))
    assert noise["systems"]["student"]["wer"] == rate(noisy)
    assert noise["systems"]["student"]["errors"] == sum(line["errors"] for line in noisy)
    for one in slices.values():
        assert sum(value["words"] for value in one["values"]) == report["data"]["words"]
        assert (
            sum(value["systems"]["student"]["errors"] for value in one["values"])
            == report["systems"]["student"]["errors"]
        )
    assert slices["snr"]["bands"]
    assert [value["value"] for value in slices["snr"]["values"]][:2] == ["-5 to 0", "0 to 5"]


def test_named_slices(report: dict[str, Any]) -> None:
    worst, changed = report["slices_worst"][0], report["slices_changed"][0]
    assert (worst["field"], worst["value"], worst["system"]) == ("condition", "noise", "student")
    assert worst["wer"] > report["systems"]["student"]["wer"]
    assert (changed["field"], changed["value"], changed["other"]) == ("condition", "noise", "teacher")
    assert changed["difference"] == changed["wer"] - changed["other_wer"] > 0


def test_slices_of_the_same_utterances_are_named_once(checkpoints: dict[str, Path]) -> None:
    made = lines_of("a", 80, 9)
    for line in made:
        line["fields"]["again"] = line["fields"]["condition"]
    report = summed_up(checkpoints, {"a": [made]}, teacher="teacher")
    assert {one["field"] for one in report["slices"]} >= {"condition", "again"}
    for named in (report["slices_worst"], report["slices_changed"]):
        assert "again" not in {one["field"] for one in named}
    assert "condition" in {one["field"] for one in report["slices_worst"]}


def test_samples(report: dict[str, Any]) -> None:
    samples = report["samples"]
    assert len(samples) == 2 * SAMPLES
    assert len({(one["set"], one["key"]) for one in samples}) == 2 * SAMPLES
    most = max(line["errors"] for line in every("student"))
    assert samples[0]["why"] == f"student: {most} errors"
    assert samples[-1]["why"].endswith("more than teacher")


def test_times_and_confidences(report: dict[str, Any]) -> None:
    student = report["systems"]["student"]
    assert report["systems"]["teacher"]["word_delay_ms"] is None
    assert abs(student["word_delay_ms"]["median"]) <= 1000
    calibration = student["calibration"]
    assert calibration["words"] == sum(len(line["times"]) for line in every("student"))
    assert calibration["bins"][9]["accuracy"] > 0.8 > calibration["bins"][3]["accuracy"]
    assert calibration["normalised_cross_entropy"] > 0.3


def test_the_delay_of_words_that_are_right(checkpoints: dict[str, Path]) -> None:
    made = lines_of("one", 20, 5)
    teacher = [line for line in made if line["system"] == "teacher"]
    late = [
        line | {"system": "student", "times": [[word, a, b + 0.12, c] for word, a, b, c in line["times"]]}
        for line in teacher
    ]
    found = summed_up(checkpoints, {"one": [teacher + late]}, teacher="teacher")["systems"]["student"]["word_delay_ms"]
    assert (found["median"], found["p90"]) == (120, 120)
    assert found["words"] == sum(line["words"] - line["substitutions"] - line["deletions"] for line in teacher)


def test_shards_may_come_in_any_number(checkpoints: dict[str, Path], report: dict[str, Any]) -> None:
    """A shard's lines are system by system; all utterances in one shard give the same figures."""
    whole = {
        name: [sorted(itertools.chain(*shards), key=lambda line: line["system"] == "student")]
        for name, shards in LINES.items()
    }
    again = summed_up(checkpoints, whole, baseline="teacher", teacher="teacher", student="student")
    for key in ("pairs", "slices", "slices_worst", "slices_changed", "samples"):
        assert again[key] == report[key]


def test_one_utterance_without_anything(checkpoints: dict[str, Path]) -> None:
    """No reference words in a set, no speakers, no times: figures that are not defined are null."""
    empty = {
        "reference": "",
        "reference_scored": "",
        "hypothesis": "",
        "hypothesis_scored": "",
        "times": [],
        "speaker": None,
    }
    empty |= dict.fromkeys(
        ("words", "substitutions", "deletions", "insertions", "errors", "characters", "character_errors"), 0
    )
    made = lines_of("full", 3, 1)
    hollow = [line | empty | {"set": "hollow"} for line in made[:1] + made[3:4]]
    report = summed_up(checkpoints, {"full": [made], "hollow": [hollow]})
    assert json.dumps(report, allow_nan=False)
    student = report["systems"]["student"]
    assert student["sets"]["hollow"]["wer"] == 0.0
    wrong = [hollow[0], hollow[1] | {"hypothesis_scored": "a", "insertions": 1, "errors": 1}]
    report = summed_up(checkpoints, {"full": [made], "hollow": [wrong]})
    assert report["systems"]["student"]["sets"]["hollow"]["wer"] is None
    report = summed_up(checkpoints, {"full": [made], "hollow": [wrong[::-1]]}, baseline="student")
    assert report["systems"]["teacher"]["sets"]["hollow"]["change_to_baseline"] is None
    assert report["systems"]["student"]["mean_of_sets_wer"] is None
    assert report["data"]["speakers"] is None
    assert json.dumps(report, allow_nan=False)


def test_intervals_of_a_slice_draw_speakers(checkpoints: dict[str, Path]) -> None:
    """Where all utterances of a speaker are alike, drawing speakers shows how few there are."""
    made = lines_of("a", 60, 9)
    for index, line in enumerate(made):
        bad = index % 2
        line |= {"speaker": f"s{bad}", "words": 4, "errors": 4 * bad, "substitutions": 4 * bad}
        line |= {"reference_scored": "a a a a", "hypothesis_scored": "b b b b" if bad else "a a a a", "times": []}
        line["fields"] = {"half": "one" if index % 30 < 15 else "two"}
    report = summed_up(checkpoints, {"a": [made]})
    (half,) = (one for one in report["slices"] if one["field"] == "half")
    assert half["values"][0]["systems"]["student"]["interval"] == [0.0, 1.0]
    assert (half["values"][0]["blocks"], half["values"][0]["number"]) == ("speakers", 2)
    (speaker,) = (one for one in report["slices"] if one["field"] == "speaker")
    assert [(one["blocks"], one["number"]) for one in speaker["values"]] == [("utterances", 30)] * 2
    assert np.isfinite(report["systems"]["student"]["wer"])


def test_of_an_utterance_a_few_bytes_are_held() -> None:
    systems = {"teacher": "teacher", "student": "student"}
    scores = Scores(EvalSettings(systems=systems, audio="home", output="out", teacher="teacher"))

    def add(shards: int) -> None:
        for _ in range(shards):
            scores.add("home", LINES["home"][0], 900.0, 0)

    add(1)  # what is held once: words, speakers, the worst
    tracemalloc.start()
    try:
        add(30)
        gc.collect()  # what waits to be freed is not held
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < len(scores.words) * 80  # arrays grow ahead; a text would be several times that
