from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import pytest

from asr_kd.evaluation.utterances import Packed, by_utterance, edits_of, pack
from asr_kd.evaluation.wer import align

SYSTEMS = ["big", "small"]


def line(system: str, key: str, reference: str, hypothesis: str, **changes: Any) -> dict[str, Any]:
    errors = sum(edit.kind != "equal" for edit in align(reference, hypothesis))
    return {
        "system": system, "set": "test", "shard": "a.tar", "key": key, "speaker": None, "seconds": 1.2345,
        "fields": {"snr": 5.0, "noisy": True, "room": "hall", "n": 3}, "reference_scored": reference,
        "hypothesis_scored": hypothesis, "errors": errors,
    } | changes  # fmt: skip


def unpacked(packed: Packed) -> tuple[dict[str, Any], list[list[Any]]]:
    head, *rows = gzip.decompress(base64.b64decode(packed.block)).decode().rstrip("\n").split("\n")
    return json.loads(head), list(map(json.loads, rows))


def applied(reference: str, edits: list[list[Any]]) -> str:
    """The hypothesis, rebuilt as the page does it."""
    out, words = [], reference.split()
    for index in range(len(words) + 1):
        mine = [edit for edit in edits if edit[0] == index]
        out += [edit[1] for edit in mine if len(edit) == 3]
        rest = [edit for edit in mine if len(edit) < 3]
        if rest:
            out += rest[0][1:]
        elif index < len(words):
            out.append(words[index])
    return " ".join(out)


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("a b c", "a b c"), ("a b c", ""), ("", "x y"), ("", ""), ("a b", "x a y b z"), ("a b c d", "b c d e"),
        ("é 語 </script>", "語 </script> \u2028"), ("a a a", "b"), ("one two", "six seven eight"),
    ],
)  # fmt: skip
def test_rows_rebuild_the_hypothesis(reference: str, hypothesis: str) -> None:
    packed = pack(lambda: [line("big", "k", reference, hypothesis)], ["big"], [], set(), 1)
    head, [row] = unpacked(packed)
    assert head == {"systems": ["big"], "fields": []}
    assert row[:6] == ["k", "test", None, 1.23, reference, []]
    assert applied(reference, row[6]) == " ".join(hypothesis.split())


def test_lines_of_an_utterance_meet_across_systems_but_not_across_shards() -> None:
    lines = [
        line(system, key, "a", "a", shard=shard)
        for shard in ("a.tar", "b.tar")
        for system in SYSTEMS
        for key in ("u", "v")
    ]
    groups = list(by_utterance(iter(lines)))
    assert [[(one["shard"], one["key"]) for one in group.values()] for group in groups] == [
        [(shard, key)] * 2 for shard in ("a.tar", "b.tar") for key in ("u", "v")
    ]
    assert all(list(group) == SYSTEMS for group in groups)


def test_fields_are_named_as_slices_name_them_and_wanted_lines_come_back() -> None:
    lines = [line("big", "k", "a b", "a"), line("small", "k", "a b", "a b", speaker="x")]
    packed = pack(
        lambda: lines, [*SYSTEMS, "absent"], ["snr", "noisy", "room", "n", "none"], {("test", "k", "a.tar")}, 1
    )
    assert unpacked(packed)[1] == [["k", "test", None, 1.23, "a b", ["5", "true", "hall", "3", None], [[1]], [], None]]
    assert list(packed.wanted) == [("test", "k", "a.tar")]
    assert [edit.kind for edit in edits_of(packed.wanted["test", "k", "a.tar"]["big"])] == ["equal", "deletion"]


@pytest.mark.parametrize("limit", range(1, 8))
def test_too_many_rows_leave_those_with_the_most_errors(limit: int) -> None:
    errors = [0, 2, 1, 2, 0, 1]
    lines = [line("big", f"u{index}", "a b", " ".join("ab"[number:])) for index, number in enumerate(errors)]
    packed = pack(lambda: lines, ["big"], [], {("test", "u0", "a.tar")}, len(lines), limit)
    keys = [row[0] for row in unpacked(packed)[1]]
    best = sorted(range(6), key=lambda index: -errors[index])[:limit]
    assert keys == [f"u{index}" for index in sorted(best)]
    assert (packed.rows, packed.utterances) == (min(limit, 6), 6)
    assert list(packed.wanted) == [("test", "u0", "a.tar")]


def test_an_utterance_of_the_same_key_in_another_shard_is_another() -> None:
    """As in sets that were joined."""
    lines = [line("big", "k", "a b", said, shard=shard) for shard, said in (("a.tar", "a"), ("b.tar", "b"))]
    packed = pack(lambda: lines, ["big"], [], {("test", "k", "a.tar")}, 2)
    assert [group["big"]["hypothesis_scored"] for group in packed.wanted.values()] == ["a"]


def test_the_same_lines_pack_to_the_same_bytes() -> None:
    lines = [line("big", f"u{index}", "a b", "a") for index in range(50)]
    assert pack(lambda: lines, ["big"], [], set(), 50).block == pack(lambda: lines, ["big"], [], set(), 50).block
