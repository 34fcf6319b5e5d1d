from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import UserError
from asr_kd.files import hash_json, sha256_file
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.tarset import Sample, read_members, write_members, write_shard
from asr_kd.targets.codec import LEVELS, encode
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import (
    CodecDescription,
    Selection,
    Statistics,
    TargetMetadata,
    read_metadata,
    read_target_shard,
    teacher_of,
    with_targets,
    write_target_shard,
)
from tests.joining import join

IDS = {"a": [1, 1, 2], "b": [0, 4], "d": [3]}
TARGETS = {key: SparsePosteriors.from_alignment(np.array(ids), 5) for key, ids in IDS.items()}


def description(audio_sha256: str, **changes: Any) -> TargetMetadata:
    frames = sum(target.frames for target in TARGETS.values())
    statistics = Statistics(
        utterances=len(TARGETS), frames=frames, audio_seconds=0.2, entries_per_frame=1.0, bytes_per_frame=9.0,
        mean_kept_mass=1.0, mean_kl=None, worst_kl=None, top1_kept=None,
    )  # fmt: skip
    values: dict[str, Any] = {
        "codec": CodecDescription(version=1, levels=LEVELS),
        "selection": Selection(mode="mass", k=20, mass=0.999),
        "teacher": "feedc0de", "units_hash": "abcd", "num_units": 5, "frame_ms": 30, "features": FeatureSettings(),
        "audio_sha256": audio_sha256, "quarantined": {"c": "empty"}, "statistics": statistics,
    }  # fmt: skip
    return TargetMetadata(**(values | changes))


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    path = tmp_path / "audio" / "shard-000000.tar"
    path.parent.mkdir()
    write_shard(path, [Sample(key, key.encode() * 9, "flac", {"seconds": 0.1}) for key in "abcd"])
    return path


@pytest.fixture
def shard(tmp_path: Path, audio: Path) -> Path:
    path = tmp_path / "targets" / "shard-000000.tar"
    path.parent.mkdir()
    write_target_shard(path, description(sha256_file(audio)), TARGETS.items())
    return path


def rewrite(path: Path, change: Any) -> None:
    """Write the shard again with another list of members."""
    write_members(path, change(list(read_members(path))))


def heard(audio: Path, *keys: str) -> list[dict[str, Any]]:
    """What `asr_kd.shards.dataset` says of samples, without their sound."""
    info = ShardInfo(audio.name, 4, 0.4, audio.stat().st_size, sha256_file(audio))
    return [{"__key__": key, "__url__": str(audio), "__shard__": info, "after": (0, 0, 1)} for key in keys]


def test_a_stage_gives_samples_their_targets_from_any_place_on(shard: Path, audio: Path) -> None:
    stage = with_targets(shard.parent, units_hash="abcd", num_units=5, frame_ms=30)
    joined = list(stage(heard(audio, "b", "c", "d")))
    assert [sample["__key__"] for sample in joined] == ["b", "d"]
    for sample in joined:
        np.testing.assert_array_equal(sample["target"].units, TARGETS[sample["__key__"]].units)
    with pytest.raises(UserError, match=r"shard-000000\.tar: has no e of .*; label this audio again"):
        list(stage(heard(audio, "e")))
    with pytest.raises(UserError, match="number of units of the soft targets: 5, expected here: 6"):
        list(with_targets(shard.parent, num_units=6)(heard(audio, "a")))
    samples = heard(audio, "a")
    samples[0]["__shard__"] = ShardInfo(audio.name, 4, 0.4, 1, "0" * 64)
    with pytest.raises(UserError, match="answers an audio shard with SHA-256"):
        list(stage(samples))


def test_join_reads_in_lockstep_and_passes_over_quarantined(shard: Path, audio: Path) -> None:
    pairs = list(join(audio, shard, units_hash="abcd", num_units=5, frame_ms=30))
    assert [sample.key for sample, _ in pairs] == ["a", "b", "d"]
    for sample, target in pairs:
        assert sample.audio == sample.key.encode() * 9
        np.testing.assert_array_equal(target.units, TARGETS[sample.key].units)
    assert read_metadata(shard).quarantined == {"c": "empty"}
    assert teacher_of(shard.parent)["teacher"] == "feedc0de"
    with pytest.raises(UserError, match="holds no soft-target shards; make them with `asr-kd label`"):
        teacher_of(audio.parent.parent)


def test_bytes_do_not_depend_on_being_encoded_before(shard: Path, audio: Path) -> None:
    before = shard.read_bytes()
    encoded = ((key, encode(target)) for key, target in TARGETS.items())
    write_target_shard(shard, description(sha256_file(audio)), encoded)
    assert shard.read_bytes() == before


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"units_hash": "ffff"}, "units of the soft targets: abcd, expected here: ffff; label with a teacher"),
        ({"num_units": 6}, "number of units of the soft targets: 5, expected here: 6"),
        ({"frame_ms": 40}, "frame period in ms of the soft targets: 30, expected here: 40"),
    ],
)
def test_targets_that_do_not_fit_are_refused(shard: Path, expected: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_target_shard(shard, **expected)


def test_other_audio_is_refused(shard: Path, audio: Path) -> None:
    with pytest.raises(UserError, match=r"answers an audio shard with SHA-256 .*label this audio again"):
        list(join(audio, shard, audio_sha256="0" * 64))
    write_shard(audio, [Sample("a", b"x", "flac", {"seconds": 0.1})])
    with pytest.raises(UserError, match="answers an audio shard"):
        list(join(audio, shard))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members[:-1], "ends before d|holds 2 utterances"),
        (lambda members: [members[0], members[2], members[1], members[3]], "b stands where .* has a"),
        (lambda members: [*members, ("e.target", members[3][1])], "e is not in|holds 4 utterances"),
        (lambda members: [*members, members[1]], "a.target is foreign or there twice"),
        (lambda members: [*members, ("x.txt", b"")], "x.txt is foreign"),
        (lambda members: [*members[:3], ("d.target", members[1][1])], "holds 3 utterances and 8 frames"),
        (lambda members: [*members[:3], ("d.target", b"junk")], "d: not a soft target"),
        (lambda members: members[1:], "no metadata.json at its head"),
        (lambda members: [], "no metadata.json at its head|not"),
        (lambda members: [(members[0][0], members[0][1].replace(b"feed", b"feee")), *members[1:]], "checksum differs"),
        (lambda members: [("metadata.json", b"{"), *members[1:]], "not JSON"),
        (lambda members: [("metadata.json", b"\xff"), *members[1:]], "not UTF-8"),
        (lambda members: [("metadata.json", b"{}"), *members[1:]], "does not describe soft targets"),
    ],
)
def test_shards_that_were_tampered_with(shard: Path, audio: Path, change: Any, message: str) -> None:
    rewrite(shard, change)
    with pytest.raises(UserError, match=message):
        list(join(audio, shard))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 5, "something": "new"}, "soft targets of version 5, this program reads 4; use a newer asr_kd"),
        ({"version": "x"}, "soft targets of version x"),
        ({"num_units": "many"}, "num_units: "),
        ({"surplus": 1}, "unknown key surplus"),
        ({"num_units": 6}, "a: 5 units, its shard has 6"),
    ],
)
def test_metadata_is_enforced(shard: Path, changes: dict[str, Any], message: str) -> None:
    def change(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        value = json.loads(members[0][1]) | changes
        del value["checksum"]
        return [("metadata.json", json.dumps(value | {"checksum": hash_json(value)}).encode()), *members[1:]]

    rewrite(shard, change)
    with pytest.raises(UserError, match=message):
        list(read_target_shard(shard)[1])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_shards_give_the_right_data_or_an_error(shard: Path, audio: Path, data: st.DataObject) -> None:
    good = shard.read_bytes()
    bad = bytearray(good)
    if data.draw(st.booleans()):
        del bad[data.draw(st.integers(0, len(bad) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    other = shard.with_name("damaged.tar")
    other.write_bytes(bytes(bad))
    try:
        pairs = list(join(audio, other, units_hash="abcd", num_units=5, frame_ms=30))
    except UserError:
        return
    assert [sample.key for sample, _ in pairs] == ["a", "b", "d"]
    for sample, target in pairs:
        np.testing.assert_array_equal(target.units, TARGETS[sample.key].units)
