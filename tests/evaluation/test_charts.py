from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree

import pytest

from asr_kd.evaluation.charts import (
    Bar,
    Curve,
    Heat,
    Row,
    heat_maps,
    learning_curves,
    linear_ticks,
    log_ticks,
    reliability,
    slice_dots,
    wer_against_hours,
    wer_against_noise,
    wer_bars,
)
from asr_kd.evaluation.schema import Bin


@pytest.mark.parametrize("high", [0.0, 0.013, 1.0, 7.3, 25.0, 99.9, 101.0, 4321.0])
def test_linear_ticks_reach_the_data(high: float) -> None:
    ticks = linear_ticks(high)
    assert ticks[0] == 0
    assert ticks[-1] >= high * (1 - 1e-9)
    assert 2 <= len(ticks) <= 8
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


@pytest.mark.parametrize(("low", "high"), [(0.3, 100), (5, 5), (4.9, 51), (1, 1000), (0.001, 0.02)])
def test_log_ticks_enclose_the_data(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks[0] <= low * 1.01
    assert ticks[-1] >= high * 0.99


def numbers(svg: str) -> list[float]:
    return [float(value) for value in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width)="([^"]+)"', svg)]


@pytest.mark.parametrize("wers", [[0.0], [0.0, 0.0], [1.2, 0.0, 0.05], [0.2, 0.19]])
@pytest.mark.parametrize("hours", [0.0, 3.0])
def test_pictures_hold_any_figures(wers: list[float], hours: float) -> None:
    curve = Curve("a", "s0", [(hours * index, wer) for index, wer in enumerate(wers)])
    for svg in (str(learning_curves([curve])), str(wer_bars([Bar("a" * 99, "s0", wers[0], None)]))):
        xml.etree.ElementTree.fromstring(svg)
        assert all(math.isfinite(value) and 0 <= value <= 600 for value in numbers(svg))


@pytest.mark.parametrize("wer", [0.0, 0.07, 1.3])
@pytest.mark.parametrize("interval", [None, (0.0, 2.5)])
@pytest.mark.parametrize("hours", [[0.0, 0.0], [0.0, 100.0, 1e6], [10.0, 20.0], [3.0]])
def test_pictures_of_slices_and_hours_hold_any_figures(
    wer: float, interval: tuple[float, float] | None, hours: list[float]
) -> None:
    bar = Bar("a", "s0", wer, interval)
    slices = [Row(f"value {number}" * 9, 5, [bar] * number) for number in (1, 3)]
    for svg in (str(slice_dots("speaker", slices)), str(wer_against_hours([(one, bar) for one in hours]))):
        xml.etree.ElementTree.fromstring(svg)
        assert all(math.isfinite(value) and 0 <= value <= 600 for value in numbers(svg))


@pytest.mark.parametrize("wers", [[0.0, 0.0, 0.0], [0.05, 0.3, 1.4]])
@pytest.mark.parametrize("ratios", [[None, 20.0, -5.0], [10.0, 10.0, 10.0], [None, 3.0, 0.0]])
def test_noise_grows_to_the_right_with_clean_sound_apart(wers: list[float], ratios: list[float | None]) -> None:
    heard = [
        (ratio, [Bar("a", "s0", wer, (wer / 2, wer * 1.2)), Bar("<b>", "s1", wer / 2, None)])
        for ratio, wer in zip(ratios, wers, strict=True)
    ]
    svg = str(wer_against_noise("pink", heard))
    assert svg == str(wer_against_noise("pink", heard[::-1])) or ratios[0] == ratios[1]
    xml.etree.ElementTree.fromstring(svg)
    assert all(math.isfinite(value) and 0 <= value <= 600 for value in numbers(svg))
    places = [float(x) for x in re.findall(r'<circle cx="([^"]+)"', svg)]
    assert places[:3] == sorted(places[:3]) and (ratios[0] is None) == (">clean</text>" in svg)
    line = re.findall(r'<polyline points="([^"]*)"', svg)[0].split()
    assert len(line) == sum(
        ratio is not None for ratio in ratios
    )  # the clean sound is not on the way from one to the next
    assert "-5 dB: a" in svg or -5.0 not in ratios


def test_a_long_name_leaves_room_for_its_note_and_figure() -> None:
    svg = str(wer_bars([Bar("n" * 60, "s0", 0.1, None, "teacher"), Bar("short", "s1", 0.2, None, "baseline")]))
    (long, short) = re.findall(r'class="name halo">([^<]*)<', svg)
    assert (len(long), long[-11:], short) == (44, "… (teacher)", "short (baseline)")


def test_a_long_interval_of_a_small_slice_is_cut_at_the_edge() -> None:
    svg = str(slice_dots("snr", [Row("low", 3, [Bar("a", "s0", 0.1, (0.0, 3.0))])]))
    assert "interval 0.00 % to 300.00 %" in svg
    assert "goes on beyond the axis" in svg
    assert max(numbers(svg)) <= 520


def test_a_slice_of_few_words_does_not_stretch_the_axis() -> None:
    """It has an arrow at the edge instead of a dot, and its figure in the title and the description."""
    many = Row("many", 5000, [Bar("a", "s0", 0.05, (0.04, 0.06))])
    few = Row("few", 7, [Bar("a", "s0", 2.5, (1.0, 3.0))])
    alone, both = (str(slice_dots("speaker", slices)) for slices in ([many], [many, few]))
    assert "<polygon" not in alone
    assert "beyond" not in alone
    assert both.count("<polygon") == both.count("<circle") == 1
    assert float(re.findall(r'<circle cx="([^"]+)"', both)[0]) > 300
    assert both.count("250.00 %") == 2
    assert "<polygon" not in str(slice_dots("speaker", [few]))


def test_calibration_passes_over_empty_bins() -> None:
    bins = [
        Bin(low=0.0, high=0.5, words=0, confidence=None, accuracy=None),
        Bin(low=0.5, high=1.0, words=9, confidence=0.9, accuracy=0.5),
    ]
    for filled in (bins, bins[:1]):
        svg = str(reliability([("a", "s0", filled)]))
        xml.etree.ElementTree.fromstring(svg)
        assert svg.count("<circle") == len(filled) - 1


def test_heat_maps_share_a_time_axis() -> None:
    svg = str(heat_maps([Heat("a", "AAAA", ["x", "<y>"], 2.0), Heat("b", "AAAA", ["x"], 1.0)]))
    images = [one.attrib for one in xml.etree.ElementTree.fromstring(svg).iter("image")]
    assert float(images[0]["width"]) == 2 * float(images[1]["width"])
    assert {one["x"] for one in images} == {images[0]["x"]}
