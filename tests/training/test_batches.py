from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asr_kd.distillation.batch import Batch
from asr_kd.errors import UserError
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import read_index, read_shard, write_index, write_shard
from asr_kd.targets.store import read_metadata, read_target_shard, tail_prior
from asr_kd.training.batches import Lane, PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Cursor
from asr_kd.units import Units
from tests.learning import loss_of
from tests.training.conftest import write_targets

Job = Callable[..., TrainSettings]
CTC = {"targets": None, "soft": 0.0, "ctc": 1.0}


def all_batches(settings: TrainSettings, units: Units, number: int = 0) -> tuple[PhaseStream, list[Batch]]:
    """One pass of the first phase, in one lane."""
    stream = PhaseStream(settings, 0, units)
    stream.passes = number + 1
    lanes = [Lane(0, [Cursor(number=number) for _ in stream.sources])]
    return stream, [batch for batch in stream.batches(lanes, 0) if batch is not None]


def unused(stream: PhaseStream) -> list[tuple[int, str, str]]:
    """Of each source: utterances that could not be used, the key of the first and its reason."""
    return [(source.met.ends[0].unused, *source.met.unused) for source in stream.sources]


def rows(batch: Batch) -> list[bytes]:
    return [row[:length].numpy().tobytes() for row, length in zip(batch.features, batch.lengths, strict=True)]


def features_of(settings: TrainSettings) -> dict[str, np.ndarray]:
    folder = settings.phases[0].sources[0].audio
    wanted = ShardInput(folder=folder, features=settings.features, max_seconds=60.0)
    loaded = [load_features(wanted, info) for info in read_index(Path(folder))]
    return {item.key: item.features.astype(np.float32) for shard in loaded for item in shard.items}


def test_every_utterance_once_a_pass_with_its_own_targets(job: Job, units: Units, targets: str) -> None:
    settings = job()
    stream, batches = all_batches(settings, units)
    keys = {features.tobytes(): key for key, features in features_of(settings).items()}
    soft = {key: target for path in sorted(Path(targets).glob("*.tar")) for key, target in read_target_shard(path)[1]}
    seen = []
    for batch in batches:
        assert batch.features.shape[0] * batch.features.shape[1] <= 100 or len(batch.lengths) == 1
        assert (
            len(batch.parts["soft.units"].values)
            == len(batch.parts["soft.probs"].values)
            == len(batch.parts["soft.tail"].values)
            == batch.frames
        )
        assert batch.seconds == pytest.approx(batch.frames * 0.03) and "text" not in batch.parts
        start = 0
        for row, length in zip(rows(batch), batch.lengths.tolist(), strict=True):
            seen.append(keys[row])
            expected_units, expected_probs = soft[keys[row]].padded(batch.parts["soft.units"].values.shape[1])
            np.testing.assert_array_equal(batch.parts["soft.units"].values[start : start + length], expected_units)
            np.testing.assert_array_equal(batch.parts["soft.probs"].values[start : start + length], expected_probs)
            np.testing.assert_array_equal(batch.parts["soft.tail"].values[start : start + length], soft[keys[row]].tail)
            start += length
    assert sorted(seen) == sorted(keys.values()) and unused(stream) == [(0, "", "")]
    assert [source.utterances for source in stream.sources] == [10]


def test_labels_are_the_texts(job: Job, units: Units, audio: str) -> None:
    settings = job(source=CTC)
    texts = {
        item.key: item.fields["text"]
        for info in read_index(Path(audio))
        for item in read_shard(Path(audio) / info.name)
    }
    keys = {features.tobytes(): key for key, features in features_of(settings).items()}
    for batch in all_batches(settings, units)[1]:
        text = batch.parts["text"]
        assert text.lengths is not None and "soft.units" not in batch.parts
        labels = text.values.split(text.lengths.tolist())
        for row, ids in zip(rows(batch), labels, strict=True):
            assert units.decode(ids.tolist()) == texts[keys[row]]


def test_order_depends_on_seed_and_pass_alone(job: Job, units: Units) -> None:
    def order(number: int, **changes: Any) -> list[list[bytes]]:
        return [rows(batch) for batch in all_batches(job(**changes), units, number)[1]]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)
    augment = {"source": {"augment": {"time_masks": 2, "stretch": 0.2}}}
    assert order(0, **augment) == order(0, **augment)
    assert order(0, **augment) != order(1, **augment)


def test_masks_touch_features_and_never_targets(job: Job, units: Units) -> None:
    plain = all_batches(job(), units)[1]
    masked = all_batches(job(source={"augment": {"time_masks": 2, "mel_masks": 2}}), units)[1]
    differing = 0
    for one, other in zip(plain, masked, strict=True):
        assert torch.equal(one.lengths, other.lengths)
        for name in ("soft.units", "soft.probs", "soft.tail"):
            assert torch.equal(one.parts[name].values, other.parts[name].values)
        changed = one.features != other.features
        assert (other.features[changed] == 0).all()
        differing += int(changed.sum())
    assert differing > 0


def test_noise_touches_features_and_never_targets(job: Job, units: Units) -> None:
    def noisy(number: int = 0, **changes: Any) -> list[Batch]:
        source = {"augment": {"noise": {"share": 1.0, "reverb": 0.5, "snr_max": 5.0}}, **changes.pop("source", {})}
        return all_batches(job(source=source, **changes), units, number)[1]

    plain, loud = all_batches(job(), units)[1], noisy()
    for one, other in zip(plain, loud, strict=True):
        assert torch.equal(one.lengths, other.lengths) and one.features.shape == other.features.shape
        for name in ("soft.units", "soft.probs", "soft.tail"):
            assert torch.equal(one.parts[name].values, other.parts[name].values)
        assert not set(rows(one)) & set(rows(other))

    def heard(batches: list[Batch]) -> list[list[bytes]]:
        return [rows(batch) for batch in batches]

    assert heard(loud) == heard(noisy()) == heard(noisy(loader_workers=1))
    others = [noisy(1), noisy(seed=1)]
    assert not {row for batch in heard(loud) for row in batch} & {row for one in others for b in one for row in rows(b)}
    # an utterance that is read twice in a pass is heard in two noises
    twice = [row for batch in noisy(source={"repeat": 2}) for row in rows(batch)]
    assert len(set(twice)) == len(twice) == 20


def test_a_noise_folder_without_audio_is_refused_at_once(job: Job, units: Units, tmp_path: Path) -> None:
    noise = {"kinds": ["files"], "folder": str(tmp_path)}
    with pytest.raises(UserError, match=r"holds no audio; give a folder with files of wav"):
        PhaseStream(job(source={"augment": {"noise": noise}}), 0, units)


def test_targets_follow_a_stretch(job: Job, units: Units) -> None:
    plain = all_batches(job(), units)[1]
    changed = all_batches(job(source={"augment": {"stretch": 0.3}}), units)[1]
    lengths = []
    for one, other in zip(plain, changed, strict=True):
        assert other.seconds == one.seconds and len(other.parts["soft.units"].values) == other.frames
        starts = (np.cumsum([0, *one.lengths.tolist()]), np.cumsum([0, *other.lengths.tolist()]))
        for index in range(len(one.lengths)):
            before, after = (
                batch.parts["soft.units"].values[start[index] : start[index + 1], 0].tolist()
                for batch, start in zip((one, other), starts, strict=True)
            )
            # the same units in the same order; only how long each lasts has changed
            assert runs(before) == runs(after)
            lengths.append(len(after) / len(before))
    assert min(lengths) < 0.9 and max(lengths) > 1.1 and min(lengths) > 0.65 and max(lengths) < 1.35


def runs(ids: list[int]) -> list[int]:
    return [unit for unit, before in zip(ids, [-1, *ids], strict=False) if unit != before]


def test_sources_advance_at_the_same_pace(job: Job, units: Units) -> None:
    source = job().phases[0].sources[0].model_dump()
    phase = {"sources": [source, {**source, "repeat": 3}], "passes": 1}
    stream, batches = all_batches(job(phases=[phase]), units)
    done = [0.0, 0.0]
    longest = max(batch.seconds for batch in batches)
    for batch in batches:
        done[batch.source] += batch.seconds
        shares = [done[index] / stream.sources[index].seconds for index in (0, 1)]
        assert abs(shares[0] - shares[1]) <= longest / min(source.seconds for source in stream.sources) + 0.1
    counts = Counter(row for batch in batches for row in rows(batch))
    assert (
        set(counts.values()) == {4} and len(counts) == 10 and sum(source.utterances for source in stream.sources) == 40
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units_hash": "feedfeedfeedfeed"}, r"shard-\d+\.tar: units of the soft targets: feedfeed.*same units"),
        ({"num_units": 99}, "number of units of the soft targets: 99, expected here: 5"),
        ({"frame_ms": 40}, "frame period in ms of the soft targets: 40, expected here: 30"),
        ({"audio_sha256": "0" * 64}, r"answers an audio shard with SHA-256 0000.*label this audio again"),
    ],
)
def test_targets_of_others_are_refused(
    job: Job, units: Units, audio: str, targets: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from asr_kd.targets.store import write_target_shard

    (tmp_path / "targets").mkdir()
    for path in Path(targets).glob("*.tar"):
        metadata, pairs = read_target_shard(path)
        write_target_shard(tmp_path / "targets" / path.name, metadata.model_copy(update=changes), pairs)
    with pytest.raises(UserError, match=message):
        all_batches(job(source={"targets": str(tmp_path / "targets")}), units)


def test_targets_of_other_features_or_none_at_all_are_refused(
    job: Job, units: Units, targets: str, tmp_path: Path
) -> None:
    # the same frame period, but a window of 100 ms fits less often
    features = job().features.model_copy(update={"window_ms": 100}).model_dump()
    with pytest.raises(UserError, match=r"u\d has \d+ target frames for \d+ feature frames; label this audio"):
        all_batches(job(features=features), units)
    path = sorted(Path(targets).glob("*.tar"))[0]
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"some/shard-00000[12]\.tar"):
        all_batches(job(source={"targets": str(tmp_path / "some")}), units)


def test_utterances_without_target_or_text_are_left_out_and_counted(
    job: Job, units: Units, targets: str, audio: str, tmp_path: Path
) -> None:
    from asr_kd.targets.store import write_target_shard

    (tmp_path / "targets").mkdir()
    for path in Path(targets).glob("*.tar"):
        metadata, pairs = read_target_shard(path)
        kept = [(key, target) for key, target in pairs if key != "u5"]
        frames = sum(target.frames for _, target in kept)
        statistics = metadata.statistics.model_copy(update={"utterances": len(kept), "frames": frames})
        changed = metadata.model_copy(update={"statistics": statistics})
        write_target_shard(tmp_path / "targets" / path.name, changed, kept)
    source = {"targets": str(tmp_path / "targets")}
    stream, batches = all_batches(job(source=source, max_bad_share=0.1), units)
    assert sum(len(batch.lengths) for batch in batches) == 9
    assert unused(stream) == [(1, "u5", f"no soft target in {tmp_path / 'targets'}")]
    with pytest.raises(UserError, match=r"1 of 10 utterances cannot be used, more than max_bad_share 0\.09 .first: u5"):
        all_batches(job(source=source, max_bad_share=0.09), units)

    transcripts = tmp_path / "texts.jsonl"
    transcripts.write_text("".join(f'{{"key": "u{number}", "text": "ab"}}\n' for number in range(9)))
    stream, _ = all_batches(job(source={**CTC, "transcripts": str(transcripts)}, max_bad_share=0.1), units)
    assert unused(stream) == [(1, "u9", "no text to learn from")]


def test_text_that_the_units_do_not_cover_is_left_out(job: Job, units: Units, tmp_path: Path) -> None:
    transcripts = tmp_path / "texts.jsonl"
    texts = ["ab"] * 9 + ["abc"]
    transcripts.write_text("".join(f'{{"key": "u{n}", "text": "{text}"}}\n' for n, text in enumerate(texts)))
    stream, batches = all_batches(job(source={**CTC, "transcripts": str(transcripts)}, max_bad_share=0.1), units)
    assert unused(stream) == [(1, "u9", "text holds 'c', which no unit covers")]
    assert not any((batch.parts["text"].values == units.unknown).any() for batch in batches)


@pytest.mark.parametrize("stretch", [0.0, 0.3])
def test_text_that_does_not_fit_is_left_out(job: Job, units: Units, audio: str, tmp_path: Path, stretch: float) -> None:
    # CTC needs a frame a unit and one between equal neighbours; a loss without a path is infinite
    samples = [item for info in read_index(Path(audio)) for item in read_shard(Path(audio) / info.name)]
    frames = {key: len(features) for key, features in features_of(job()).items()}
    for number, item in enumerate(samples):
        item.fields["text"] = "ab" * round(frames[item.key] * (0.5 + 0.07 * number) / 2)
    (tmp_path / "long").mkdir()
    write_index(tmp_path / "long", [write_shard(tmp_path / "long" / "shard-000000.tar", samples)])
    settings = job(source={**CTC, "audio": str(tmp_path / "long"), "augment": {"stretch": stretch}}, max_bad_share=1.0)
    for number in range(8):
        stream, batches = all_batches(settings, units, number)
        assert sum(len(batch.lengths) for batch in batches) + unused(stream)[0][0] == 10
        assert unused(stream)[0][0] and "do not fit into" in unused(stream)[0][2]
        for batch in batches:
            logits = torch.zeros(*batch.features.shape[:2], units.size)
            assert torch.isfinite(loss_of(logits, batch, settings))


@pytest.mark.parametrize("soft", [True, False])
def test_padding_frames_do_not_count(job: Job, units: Units, soft: bool) -> None:
    settings = job(batch_frames=1000, bucket_utterances=10, **({} if soft else {"source": CTC}))
    (batch,) = all_batches(settings, units)[1]
    torch.manual_seed(0)
    logits = torch.randn(*batch.features.shape[:2], units.size).requires_grad_()
    loss = loss_of(logits, batch, settings)
    loss.backward()
    padding = torch.arange(logits.shape[1])[None, :] >= batch.lengths[:, None]
    assert logits.grad is not None and (logits.grad[padding] == 0).all() and (logits.grad[~padding] != 0).any()
    longer = torch.nn.functional.pad(logits.detach(), (0, 0, 0, 5), value=9.0)
    torch.testing.assert_close(loss_of(longer, batch, settings), loss)


@pytest.mark.parametrize("missing", ["uniform", "prior"])
def test_loss_is_a_mean_over_frames(job: Job, units: Units, missing: str) -> None:
    settings = job(missing_mass=missing, batch_frames=1000, bucket_utterances=10)
    (batch,) = all_batches(settings, units)[1]
    assert ("soft.priors" in batch.parts) == (missing == "prior")
    logits = torch.randn(*batch.features.shape[:2], units.size, generator=torch.Generator().manual_seed(0)).double()
    total = 0.0
    frame = 0
    for row, length in zip(logits.log_softmax(-1), batch.lengths.tolist(), strict=True):
        for log_probs in row[:length]:
            kept = batch.parts["soft.probs"].values[frame] > 0
            dense = torch.ones(units.size)
            if missing == "prior":
                dense = batch.parts["soft.priors"].values[batch.parts["soft.prior"].values[frame]].clone()
            dense[batch.parts["soft.units"].values[frame][kept]] = 0.0
            dense *= batch.parts["soft.tail"].values[frame] / dense.sum().clamp_min(1e-9)
            dense[batch.parts["soft.units"].values[frame][kept]] = batch.parts["soft.probs"].values[frame][kept]
            total -= float(dense.double() @ log_probs)
            frame += 1
    loss = loss_of(logits, batch, settings)
    assert loss.item() == pytest.approx(total / frame, rel=1e-5)


def test_every_utterance_has_the_prior_of_its_shard(job: Job, audio: str, targets: str, units: Units) -> None:
    settings = job(missing_mass="prior", batch_frames=1000, bucket_utterances=10)
    expected = {
        item.key: tail_prior(path, read_metadata(path))
        for path in sorted(Path(targets).glob("*.tar"))
        for item in read_shard(Path(audio) / path.name)
    }
    keys = {features.tobytes(): key for key, features in features_of(settings).items()}
    (batch,) = all_batches(settings, units)[1]
    assert len(batch.lengths) == len(expected)
    starts = batch.lengths.cumsum(0) - batch.lengths
    for row, start, length in zip(rows(batch), starts.tolist(), batch.lengths.tolist(), strict=True):
        (which,) = batch.parts["soft.prior"].values[start : start + length].unique().tolist()
        np.testing.assert_allclose(batch.parts["soft.priors"].values[which], expected[keys[row]], rtol=1e-6)


def test_targets_without_a_prior_are_refused_where_one_is_needed(
    job: Job, audio: str, units: Units, tmp_path: Path
) -> None:
    bare = write_targets(tmp_path / "bare", audio, units, tail_prior=None)
    with pytest.raises(UserError, match=r"has no prior .* choose missing_mass=ghost"):
        all_batches(job(missing_mass="prior", source={"targets": bare}), units)
    assert all_batches(job(source={"targets": bare}), units)


def test_passes_follow_from_the_hours_that_are_asked_for(job: Job, units: Units) -> None:
    once = PhaseStream(job(phase={"passes": 1}), 0, units).seconds
    for passes, hours, expected in ((1, 2.5 * once / 3600, 3), (4, 2.5 * once / 3600, 4), (2, 0.0, 2)):
        stream = PhaseStream(job(phase={"passes": passes, "hours_at_least": hours}), 0, units)
        assert stream.passes == expected and stream.seconds == pytest.approx(once * expected)
        batches = [batch for batch in stream.batches(stream.start(), 0) if batch is not None]
        assert sum(batch.seconds for batch in batches) == pytest.approx(once * expected, rel=0.05)


def test_transcripts_are_drawn_anew_each_pass_and_the_same_for_one_seed(job: Job, units: Units, audio: str) -> None:
    settings = job(source={"sequences": {"temperature": 3.0}})
    first, again = (all_batches(settings, units)[1] for _ in range(2))
    for one, other in zip(first, again, strict=True):
        drawn = one.parts["sequences"]
        assert torch.equal(drawn.values, other.parts["sequences"].values)
        assert drawn.lengths is not None and len(drawn.lengths) == len(one.lengths)
    second = all_batches(settings, units, 1)[1][len(first) :]
    assert {tuple(batch.parts["sequences"].values.tolist()) for batch in first} != {
        tuple(batch.parts["sequences"].values.tolist()) for batch in second
    }


def test_n_best_lists_are_drawn_and_learned_by_ctc(job: Job, units: Units, audio: str, tmp_path: Path) -> None:
    keys = [item.key for info in read_index(Path(audio)) for item in read_shard(Path(audio) / info.name)]
    lists = tmp_path / "lists.jsonl"
    lines: list[dict[str, Any]] = [{"key": keys[0], "text": "a"}]  # no list: the text alone
    nbest = [{"text": "a", "score": -1.0}, {"text": "b", "score": -1.5}, {"text": "?", "score": 0}]
    lines += [{"key": key, "text": "a", "nbest": nbest} for key in keys[1:]]
    lists.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = job(source={"targets": None, "transcripts": str(lists), "sequences": {"draws": 2}})
    stream, batches = all_batches(settings, units)
    assert unused(stream) == [(0, "", "")]
    found = set()
    for batch in batches:
        drawn = batch.parts["sequences"]
        assert drawn.lengths is not None
        ids = drawn.values.split(drawn.lengths.tolist())
        assert len(ids) == 2 * len(batch.lengths)
        found |= {units.decode(one.tolist()) for one in ids}
        # the loss is the mean of CTC's on both
        logits = torch.randn(*batch.features.shape[:2], units.size, generator=torch.Generator().manual_seed(0))
        expected = [
            torch.nn.functional.ctc_loss(
                logits.log_softmax(-1).transpose(0, 1),
                torch.cat(part),
                batch.lengths,
                torch.tensor([*map(len, part)]),
                0,
                "sum",
            )
            for part in (ids[: len(batch.lengths)], ids[len(batch.lengths) :])
        ]
        loss = loss_of(logits, batch, settings)
        torch.testing.assert_close(loss, sum(expected) / 2 / batch.frames)
    assert found == {"a", "b"}  # nothing that the units cannot write


def test_an_utterance_of_whose_list_nothing_can_be_learned_is_named(
    job: Job, units: Units, audio: str, tmp_path: Path
) -> None:
    keys = [item.key for info in read_index(Path(audio)) for item in read_shard(Path(audio) / info.name)]
    lists = tmp_path / "lists.jsonl"
    lines = [{"key": key, "text": "a"} for key in keys[2:]]
    lines.append({"key": keys[0], "text": "a", "nbest": [{"text": "?", "score": 0.0}]})
    lists.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"targets": None, "transcripts": str(lists), "sequences": {}}
    stream, _ = all_batches(job(source=source, max_bad_share=0.5), units)
    assert stream.sources[0].met.ends[0].unused == 2
    assert stream.sources[0].met.unused[1] in (
        "no text to learn from",
        "text holds '?', which no unit covers",
    )
