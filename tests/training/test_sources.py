from __future__ import annotations

import gc
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asr_kd.config.load import build
from asr_kd.distillation.batch import Batch
from asr_kd.errors import UserError
from asr_kd.selection import job as selection
from asr_kd.selection.job import select
from asr_kd.selection.settings import SelectionSettings
from asr_kd.shards.manifest import write_transcripts
from asr_kd.shards.tarset import Sample, read_index, read_shard, write_index, write_shard
from asr_kd.training.batches import Lane, PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.units import Units
from tests.training.conftest import sample, soft_target, write_audio, write_targets

Job = Callable[..., TrainSettings]


def whole_job(
    settings: TrainSettings,
    units: Units,
    ranks: int = 1,
    cycles: int = 1,
    lanes: list[Lane] | None = None,
    turn: int = 0,
) -> list[Batch]:
    """The batches of all processes in the order of the steps."""
    order: list[Batch] = []
    for cycle in range(cycles):
        stream = PhaseStream(settings, 0, units)
        lanes = lanes or stream.start()
        processes = [stream.batches(lanes, cycle, turn, rank, ranks) for rank in range(ranks)]
        alive = True
        while alive:
            # of a step, in the order of lanes
            first = turn % settings.lanes
            got = [next(processes[(first + place) % ranks], "ended") for place in range(ranks)]
            alive = any(one != "ended" for one in got)
            order += [one for one in got if isinstance(one, Batch)]
            turn += ranks
        lanes = [
            next((one.after for one in reversed(order) if one.lane == lane), lanes[lane]) for lane in range(len(lanes))
        ]
        turn = 0
    return order


def contents(batches: list[Batch]) -> list[bytes]:
    return [b"".join(tensor.numpy().tobytes() for tensor in (one.features, one.lengths)) for one in batches]


def utterances(batches: list[Batch]) -> Counter[bytes]:
    return Counter(
        row[:length].numpy().tobytes()
        for batch in batches
        for row, length in zip(batch.features, batch.lengths, strict=True)
    )


MIXED = {"bucket_utterances": 3, "batch_frames": 60}


def mixed(job: Job, **changes: Any) -> TrainSettings:
    """Two sources, one of them read twice a pass, masks, and blocks that end within shards."""
    source = {**job().phases[0].sources[0].model_dump(), "augment": {"time_masks": 1}}
    phase = {"sources": [source, {**source, "repeat": 2}], "passes": 2, **changes.pop("phase", {})}
    return job(phases=[phase], **MIXED, **changes)


@pytest.mark.parametrize("lanes", [1, 2, 3, 6, 12])
def test_every_utterance_once_a_pass_for_any_number_of_lanes(job: Job, units: Units, lanes: int) -> None:
    # 3 shards, or 6 a pass where they are read twice: with more lanes than that each takes its share of utterances
    source = job().phases[0].sources[0].model_dump()
    settings = job(phases=[{"sources": [source, {**source, "repeat": 2}], "passes": 2}], **MIXED, lanes=lanes)
    counts = utterances(whole_job(settings, units))
    assert set(counts.values()) == {6} and len(counts) == 10


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_order_of_the_job_is_the_same_for_any_number_of_processes(job: Job, units: Units, ranks: int) -> None:
    settings = mixed(job, lanes=6)
    one, several = whole_job(settings, units), whole_job(settings, units, ranks)
    assert contents(one) == contents(several)
    assert contents(one) != contents(whole_job(mixed(job, lanes=6, seed=1), units))


@pytest.mark.parametrize("ranks", [1, 2])
def test_going_on_from_any_batch_gives_the_rest(job: Job, units: Units, ranks: int) -> None:
    settings = mixed(job, lanes=2)
    batches = whole_job(settings, units)
    expected = contents(batches)
    lanes = PhaseStream(settings, 0, units).start()
    turns = 0
    for place, batch in enumerate(batches[:-1]):
        lanes[batch.lane] = Lane.from_json(json.loads(json.dumps(asdict(batch.after))))
        turns = batch.lane + 1
        if turns % ranks == 0:
            rest = whole_job(settings, units, ranks, lanes=list(lanes), turn=turns % 2)
            assert contents(rest) == expected[place + 1 :], place


def test_a_slice_of_hours_goes_on_in_the_next_cycle(job: Job, units: Units, audio: str) -> None:
    hours = sum(info.seconds for info in read_index(Path(audio))) / 3600
    settings = job(phase={"passes": None, "hours": 0.75 * hours}, **MIXED)
    batches = whole_job(settings, units, cycles=4)
    counts = utterances(batches)
    # 4 slices of 0.75 passes
    assert len(counts) == 10 and set(counts.values()) <= {3, 4} and sum(counts.values()) <= 34
    endless = whole_job(job(phase={"passes": 4}, **MIXED), units)
    assert contents(batches) == contents(endless)[: len(batches)]


def test_sources_of_a_slice_are_mixed_by_weight(job: Job, units: Units, audio: str) -> None:
    hours = sum(info.seconds for info in read_index(Path(audio))) / 3600
    source = job().phases[0].sources[0].model_dump()
    phase = {"sources": [{**source, "weight": 3.0}, {**source, "weight": 1.0}], "hours": 8 * hours}
    batches = whole_job(job(phases=[phase], **MIXED), units)
    heard = [sum(one.seconds for one in batches if one.source == index) for index in (0, 1)]
    assert heard[0] / heard[1] == pytest.approx(3, rel=0.1)
    assert sum(heard) == pytest.approx(8 * hours * 3600, rel=0.05)


@pytest.mark.parametrize("context", [(0, 0), (3, 2), (50, 50)])
def test_chunks_hold_every_frame_once_with_its_target(job: Job, units: Units, context: tuple[int, int]) -> None:
    whole = whole_job(job(phase={"passes": 1}, **MIXED), units)
    chunks = {"frames": 7, "left": context[0], "right": context[1]}
    cut = whole_job(job(phase={"passes": 1, "chunks": chunks}, **MIXED), units)

    def frames(batches: list[Batch]) -> Counter[bytes]:
        found: Counter[bytes] = Counter()
        for batch in batches:
            learned = [
                row[first:last]
                for row, first, last in zip(batch.features, batch.first.tolist(), batch.last.tolist(), strict=True)
            ]
            rows = torch.cat(learned)
            assert (
                len(rows)
                == batch.frames
                == len(batch.parts["soft.units"].values)
                == len(batch.parts["soft.tail"].values)
            )
            for row, unit, prob in zip(
                rows.numpy(),
                batch.parts["soft.units"].values[:, 0].numpy(),
                batch.parts["soft.probs"].values[:, 0].numpy(),
                strict=True,
            ):
                found[row.tobytes() + unit.tobytes() + prob.tobytes()] += 1
        return found

    assert frames(cut) == frames(whole)
    for batch in cut:
        assert ((batch.last - batch.first) <= 7).all() and (batch.first <= context[0]).all()
        assert (batch.lengths - batch.last <= context[1]).all()


def test_empty_sets_are_refused(job: Job, units: Units, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_index(tmp_path / "empty", [])
    with pytest.raises(UserError, match="empty: holds no utterances"):
        PhaseStream(job(source={"audio": str(tmp_path / "empty")}), 0, units)


@pytest.mark.parametrize("factor", [0.5, 1.05, 100])
def test_the_audio_of_a_shard_is_as_long_as_the_index_says(
    factor: float, job: Job, units: Units, audio: str, tmp_path: Path
) -> None:
    infos = list(read_index(Path(audio)))
    for info in infos:
        (tmp_path / info.name).write_bytes((Path(audio) / info.name).read_bytes())
    write_index(tmp_path, [replace(info, seconds=info.seconds * factor) for info in infos])
    source = {"audio": str(tmp_path), "targets": None, "soft": 0.0, "ctc": 1.0}
    steered, by_hours = job(source=source), job(source=source, phase={"passes": None, "hours": 0.001})
    assert whole_job(by_hours, units)
    if factor == 1.05:
        assert whole_job(steered, units)
    else:
        with pytest.raises(UserError, match=rf"{tmp_path}: {infos[0].name} holds .* s of audio, index\.json says "):
            whole_job(steered, units)


def test_a_lane_without_any_utterance_ends(job: Job, units: Units, audio: str, tmp_path: Path) -> None:
    samples = [next(iter(read_shard(Path(audio) / info.name))) for info in read_index(Path(audio))][:1]
    (tmp_path / "one").mkdir()
    write_index(tmp_path / "one", [write_shard(tmp_path / "one" / "shard-000000.tar", samples)])
    source = {"audio": str(tmp_path / "one"), "targets": None, "soft": 0.0, "ctc": 1.0}
    settings = job(source=source, phase={"passes": None, "hours": 0.001}, lanes=4)
    batches = whole_job(settings, units, ranks=4)
    assert {batch.lane for batch in batches} == {0} and len(batches) >= 1


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"passes": None}, "give passes or hours"),
        ({"passes": 1, "hours": 1.0}, "give passes or hours"),
        ({"chunks": {"frames": 5, "carry": True, "left": 2}}, "with carry the state is the context"),
        ({"chunks": {"frames": 0}}, "chunks.frames"),
        ({"passes": None, "hours": 1.0, "hours_at_least": 1.0}, "hours_at_least goes with passes"),
    ],
)
def test_phases_that_make_no_sense_are_refused(job: Job, phase: dict[str, Any], message: str) -> None:
    values = job().model_dump()
    values["phases"][0] |= phase
    with pytest.raises(UserError, match=message):
        build(TrainSettings, values, "run.yaml")


@pytest.mark.parametrize(
    ("source", "phase", "message"),
    [
        ({"weight": 2.0}, {}, "weight needs hours"),
        ({"ctc": 1.0}, {"chunks": {"frames": 5}}, "chunks cannot learn from ctc, which needs whole utterances"),
        ({"spikes": {}}, {"chunks": {"frames": 5}}, "chunks cannot learn from spikes, which needs whole utterances"),
        (
            {"sequences": {}},
            {"chunks": {"frames": 5}},
            "chunks cannot learn from sequences, which needs whole utterances",
        ),
        ({"sequences": {}, "spikes": {}}, {}, "two ways to learn soft targets"),
        ({"sequences": {}, "soft": 0.0, "ctc": 1.0}, {}, "sequences needs a soft weight"),
        ({"sequences": {}, "transcripts": "lists.jsonl"}, {}, "from targets .or a teacher. or from transcripts"),
        ({"augment": {"stretch": 0.1}}, {"chunks": {"frames": 5}}, "chunks cannot be stretched"),
    ],
)
def test_sources_that_do_not_fit_their_phase_are_refused(
    job: Job, source: dict[str, Any], phase: dict[str, Any], message: str
) -> None:
    values = job().model_dump()
    values["phases"][0] |= phase
    values["phases"][0]["sources"][0] |= source
    with pytest.raises(UserError, match=message):
        build(TrainSettings, values, "run.yaml")


def test_the_draws_of_a_block_do_not_depend_on_the_blocks_before(job: Job, units: Units) -> None:
    settings = job(phase={"passes": 3}, **MIXED)
    stream = PhaseStream(settings, 0, units)
    lengths = [len(batch.lengths) for batch in stream.batches(stream.start(), 0) if batch is not None]
    assert sum(lengths) == 30 and np.mean(lengths) >= 1


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, units: Units) -> Path:
    """1,600 alike utterances of as many speakers in 40 shards, with soft targets."""
    folder = tmp_path_factory.mktemp("many")
    sound = sample("", "a", 0)
    target = soft_target(sound, units)
    shards = [
        [Sample(f"utterance-{40 * shard + one:06d}", sound.audio, "flac", {**sound.fields, "speaker": f"{shard}-{one}"}) for one in range(40)]
        for shard in range(40)
    ]  # fmt: skip
    audio = write_audio(folder / "audio", shards)
    write_targets(folder / "targets", audio, units, target=target)
    return folder


def test_memory_does_not_grow_with_the_data(job: Job, units: Units, many: Path, tmp_path: Path) -> None:
    infos = read_index(many / "audio")

    def memory(utterances: int) -> int:
        """Bytes that are held by a stream of so many utterances when its last block begins."""
        audio, texts = tmp_path / f"audio-{utterances}", tmp_path / f"texts-{utterances}"
        audio.mkdir(exist_ok=True)
        for info in infos[: utterances // 40]:
            (audio / info.name).unlink(missing_ok=True)
            (audio / info.name).symlink_to(many / "audio" / info.name)
        write_index(audio, infos[: utterances // 40])
        write_transcripts(texts, ((f"utterance-{number:06d}", "a") for number in range(utterances)))
        chosen = str(tmp_path / f"chosen-{utterances}")
        select(SelectionSettings(audio=str(audio), output=chosen))
        source = {
            "audio": str(audio),
            "targets": str(many / "targets"),
            "transcripts": str(texts),
            "ctc": 1.0,
            "only": chosen,
        }
        settings = job(source=source, phase={"passes": 1}, bucket_utterances=80, batch_frames=400, missing_mass="prior")
        gc.collect()
        tracemalloc.start()
        try:
            stream = PhaseStream(settings, 0, units)
            for batch in stream.batches(stream.start(), 0):
                assert batch is not None
                cursor = batch.after.cursors[0]
                if (cursor.block, cursor.batch) == (utterances // 80 - 1, 1):
                    gc.collect()
                    return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        raise AssertionError("the last block was not read")

    # the lower of two: a thread that an earlier test has left may hold memory of its own meanwhile
    few, more = (min(memory(utterances) for _ in range(2)) for utterances in (400, 1600))
    assert more - few < 50 * 1200  # to remember a key takes 70 bytes and more


@pytest.mark.parametrize("by", ["confidence", "random"])
def test_a_choice_holds_no_more_of_more_data(
    many: Path, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos, held = read_index(many / "audio"), []
    real = selection._summary

    def summary(*arguments: Any) -> str:
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        return real(*arguments)

    monkeypatch.setattr(selection, "_summary", summary)

    def memory(utterances: int) -> int:
        """Bytes that are held once all is decided."""
        audio = tmp_path / f"audio-{utterances}"
        audio.mkdir(exist_ok=True)
        for info in infos[: utterances // 40]:
            (audio / info.name).unlink(missing_ok=True)
            (audio / info.name).symlink_to(many / "audio" / info.name)
        write_index(audio, infos[: utterances // 40])
        settings = {"audio": str(audio), "output": str(tmp_path / "list"), "share": 0.5, "by": by}
        gc.collect()
        tracemalloc.start()
        try:
            select(SelectionSettings.model_validate({**settings, "targets": str(many / "targets")}))
        finally:
            tracemalloc.stop()
        return held[-1]

    few, more = (min(memory(utterances) for _ in range(2)) for utterances in (200, 800))
    assert more - few < 50 * 600  # to remember a key takes 70 bytes and more
