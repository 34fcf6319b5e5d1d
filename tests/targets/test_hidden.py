from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.targets.hidden import HiddenDescription, HiddenStates, decode_hidden, encode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.quantiser import Quantiser
from asr_kd.targets.settings import Keep
from asr_kd.targets.store import (
    VERSION,
    read_labelled_shard,
    read_metadata,
    read_target_shard,
    teacher_of,
    write_target_shard,
)
from tests.targets.test_store import description as plain
from tests.targets.test_store import rewrite

WIDTHS = {"layer.2": 3, "layer.1": 2}
EDGES = np.array([[1, 4], [3, 5]])


def description(keep: Keep, **changes: Any) -> HiddenDescription:
    codes = {"codebooks": 2, "quantiser": "abc"} if keep == "codes" else {}
    values = {
        "keep": keep,
        "taps": WIDTHS,
        **codes,
        "rows": 6,
        "bytes_per_frame": 9.5,
        "lost": dict.fromkeys(WIDTHS, 0.01),
    }
    return HiddenDescription.model_validate(values | changes)  # fmt: skip


def states(keep: Keep, frames: int = 6, edges: np.ndarray | None = None, seed: int = 0) -> HiddenStates:
    rng = np.random.default_rng(seed)
    if keep == "codes":
        return HiddenStates(keep, frames, {tap: rng.integers(0, 256, (frames, 2)).astype(np.uint8) for tap in WIDTHS})
    edges = (EDGES if edges is None else edges) if keep == "events" else None
    rows = frames if edges is None else edges.shape[1]
    taps = {tap: rng.normal(0, 1, (rows, width)).astype(np.float16) for tap, width in WIDTHS.items()}
    return HiddenStates(keep, frames, taps, edges)


@st.composite
def utterances(draw: st.DrawFn) -> HiddenStates:
    keep, frames = draw(st.sampled_from(["events", "frames", "codes"])), draw(st.integers(1, 30))
    cuts = sorted(draw(st.sets(st.integers(0, frames), max_size=8)))
    edges = np.array([cuts[::2][: len(cuts) // 2], cuts[1::2]]).reshape(2, -1).astype(np.int64)
    return states(keep, frames, edges, draw(st.integers(0, 99)))


@given(one=utterances())
def test_what_is_read_is_what_was_written(one: HiddenStates) -> None:
    found = decode_hidden(encode_hidden(one), description(one.keep))
    assert (found.keep, found.frames, list(found.taps)) == (one.keep, one.frames, list(WIDTHS))
    for tap, rows in one.taps.items():
        np.testing.assert_array_equal(found.taps[tap], rows)
    if one.edges is not None and found.edges is not None:
        np.testing.assert_array_equal(found.edges, one.edges)
        rows = found.of_frames("layer.1")
        inside = np.full(one.frames, -1)
        for number, (start, end) in enumerate(one.edges.T):
            inside[start:end] = number
        padded = np.concatenate([one.taps["layer.1"].astype(np.float32), np.zeros((1, 2), np.float32)])
        np.testing.assert_array_equal(rows, padded[inside])


def test_bytes_of_a_member() -> None:
    """The format, as README.md has it."""
    one = HiddenStates("events", 6, {"layer.1": np.array([[1.0, -2.0]], np.float16)}, np.array([[1], [3]]))
    body = struct.pack("<II", 1, 3) + bytes.fromhex("003c00c0")
    head = b"AKDH" + bytes([1, 0, 1, 0]) + struct.pack("<II", 6, 1)
    assert encode_hidden(one) == head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head + bytes(4)))) + body
    coded = HiddenStates("codes", 2, {"layer.1": np.array([[7, 255], [0, 1]], np.uint8)})
    assert encode_hidden(coded)[20:] == bytes([7, 255, 0, 1])


def test_codes_are_read_as_such_or_decoded() -> None:
    tables = {
        tap: np.random.default_rng(1).normal(0, 1, (2, 256, width)).astype(np.float32) for tap, width in WIDTHS.items()
    }
    quantiser = Quantiser(tables)
    one = decode_hidden(encode_hidden(states("codes")), description("codes"), quantiser=quantiser)
    codes = one.of_frames("codes.layer.2")
    assert codes.dtype == np.int64 and codes.shape == (6, 2)
    np.testing.assert_allclose(
        one.of_frames("layer.2"), tables["layer.2"][0, codes[:, 0]] + tables["layer.2"][1, codes[:, 1]]
    )
    piece = one[2:5]
    np.testing.assert_array_equal(piece.of_frames("codes.layer.2"), codes[2:5])
    with pytest.raises(ValueError, match="whole utterance"):
        states("events")[1:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:10], "not hidden states of asr_kd"),
        (lambda data: b"XXXX" + data[4:], "not hidden states of asr_kd"),
        (lambda data: data[:4] + b"\x02" + data[5:], "hidden states of version 2, this program reads 1; use a newer"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "damaged .the checksum differs"),
        (lambda data: data[:-1], "damaged .the checksum differs"),
        (lambda _: encode_hidden(states("frames")), "damaged .it is not what its shard says"),
        (lambda _: encode_hidden(HiddenStates("events", 6, {"a": np.zeros((2, 3), np.float16)}, EDGES)), "damaged .it is not what its shard"),
        (lambda _: encode_hidden(states("events", 4)), "damaged .spikes overlap"),
        (lambda _: encode_hidden(states("events", edges=np.array([[1, 2], [3, 5]]))), "damaged .spikes overlap"),
    ],
)  # fmt: skip
def test_damage_is_named(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"shard: a: {message}"):
        decode_hidden(change(encode_hidden(states("events"))), description("events"), "shard: a")


def written(path: Path, keep: Keep) -> dict[str, bytes]:
    targets = {key: SparsePosteriors.from_alignment(np.array([1, 0, 2, 0, 3, 0]), 5) for key in "abd"}
    hidden = {key: encode_hidden(states(keep, seed=number)) for number, key in enumerate(targets)}
    metadata = plain("0" * 64)
    statistics = metadata.statistics.model_copy(update={"frames": 18})
    shard = metadata.model_copy(update={"statistics": statistics, "hidden": description(keep)})
    write_target_shard(path, shard, targets.items(), hidden)
    return hidden


def test_a_shard_holds_them_beside_its_soft_targets(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.tar"
    hidden = written(path, "codes")
    metadata, utterances = read_labelled_shard(path)
    assert {key: states for key, _, states in utterances} == hidden
    assert (metadata.version, metadata.hidden) == (VERSION, description("codes")) and metadata == read_metadata(path)
    assert [key for key, _ in read_target_shard(path)[1]] == list(hidden)
    assert teacher_of(tmp_path)["hidden"] == {"keep": "codes", "taps": WIDTHS, "codebooks": 2, "quantiser": "abc"}
    write_target_shard(path, plain("0" * 64), [])
    assert read_metadata(path).version == 3 and "hidden" not in teacher_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: [one for one in members if one[0] != "b.hidden"], r"d\.target follows b\.target in place of b\.hidden"),
        (lambda members: members[:-1], r"nothing follows d\.target in place of d\.hidden"),
        (lambda members: [*members[:2], ("a.hidden", members[4][1]), *members[3:]], "soft targets that are whole are not this shard's own"),
        (lambda members: [members[0], *members[2:]], r"a\.hidden is foreign"),
    ],
)  # fmt: skip
def test_a_shard_that_was_changed(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "shard-000000.tar"
    written(path, "frames")
    rewrite(path, change)
    with pytest.raises(UserError, match=message):
        list(read_labelled_shard(path)[1])
