"""What more audio would give, by points that were measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.plan.job import plan
from asr_kd.plan.law import Law, fit, read_points
from asr_kd.plan.settings import PlanSettings

HOURS = (1.0, 2.0, 4.0, 8.0)
FACTORS = (1.0, 1.1, 0.9)


def law_of(wer: Callable[[float], float], scatter: float = 0.0) -> Law:
    rng = np.random.default_rng(0)
    return fit(
        {seed: {hours: factor * wer(hours) * np.exp(rng.normal(0, scatter)) for hours in HOURS} for seed, factor in enumerate(FACTORS)}
    )  # fmt: skip


def test_points_of_a_law_are_continued() -> None:
    law = law_of(lambda hours: 0.3 * hours**-0.25)
    assert law.refusal is None
    assert law.exponent == pytest.approx((0.25, 0.25, 0.25))
    value, low, high = law.wer(128.0)
    mean = np.exp(np.log(FACTORS).mean())
    assert value == pytest.approx(mean * 0.3 * 128**-0.25)
    # seeds that lie apart by a factor, and fall alike: the t interval of their logarithms
    half = 4.303 * np.std(np.log(FACTORS), ddof=1) / 3**0.5
    assert (low, high) == pytest.approx((value * np.exp(-half), value * np.exp(half)))


def test_the_interval_grows_with_the_distance() -> None:
    law = law_of(lambda hours: 0.3 * hours**-0.4, scatter=0.03)
    widths = [np.log(high / low) for _, low, high in map(law.wer, (10.0, 100.0, 1000.0))]
    assert law.refusal is None and widths[0] < widths[1] < widths[2]


def test_what_follows_no_law_is_not_continued() -> None:
    levelling = law_of(lambda hours: 0.1 + 0.2 * hours**-1.0)
    assert levelling.refusal is not None and "helps less and less" in levelling.refusal
    falling = law_of(lambda hours: 0.3 - 0.03 * hours)
    assert falling.refusal is not None and "helps more and more" in falling.refusal
    flat = law_of(lambda hours: 0.2, scatter=0.05)
    assert flat.refusal is not None and flat.refusal.startswith("no gain is certain")


def write(path: Path, *points: object) -> Path:
    path.write_text("".join(json.dumps(point) + "\n" for point in points))
    return path


POINTS = [{"hours": hours, "wer": 0.3 / hours**0.2 + seed / 100, "seed": seed} for seed in (0, 1) for hours in HOURS]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([*POINTS, {"hours": 0, "wer": 0.5, "seed": 0}], "line 9: is no point"),
        ([*POINTS, {"hours": 16, "wer": "0.5", "seed": 0}], "line 9: is no point"),
        ([*POINTS, {"hours": 16, "wer": float("nan"), "seed": 0}], "line 9: is no point"),
        ([*POINTS, {"hours": 16, "wer": 0.5}], "line 9: is no point"),
        ([*POINTS, [1, 2, 3]], "line 9: is no point"),
        ([*POINTS, POINTS[0]], "line 9: is the second point of seed 0 at 1 hours"),
        ([*POINTS, {"hours": 16, "wer": 0.1, "seed": 0}], "no point of seed 1 at 16 hours"),
        (POINTS[:4], "has 4 amounts of audio and 1 seeds"),
        ([], "has 0 amounts of audio and 0 seeds"),
    ],
)
def test_what_are_no_points_is_refused(points: list[object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_points(write(tmp_path / "points.jsonl", *points))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "points.jsonl").write_text("hours: 3\n")
    with pytest.raises(UserError, match=r"points\.jsonl, line 1"):
        read_points(tmp_path / "points.jsonl")


def test_a_plan_says_what_the_hours_would_give(
    job: Callable[..., LabelSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = job()
    label(settings)

    def planned(*points: object) -> str:
        path = write(tmp_path / "points.jsonl", *points)
        plan(PlanSettings(audio=settings.audio, targets=settings.output, hours=80, measured=str(path)))
        return capsys.readouterr().out

    steady = [{"hours": hours, "wer": factor * 0.3 / hours**0.2, "seed": seed} for seed, factor in enumerate((1.0, 1.02)) for hours in HOURS]  # fmt: skip
    said = planned(*steady)
    assert "WER            12.6 %" in said.replace("%,", " %,") and "10 times the most that was measured" in said
    said = planned(*[{**point, "wer": 0.2 + 0.01 * (index % 3)} for index, point in enumerate(steady)])
    assert "WER: not extrapolated, no gain is certain" in said and "WER   " not in said
