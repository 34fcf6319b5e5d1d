from __future__ import annotations

import struct
import zlib

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.targets import codec
from asr_kd.targets.posteriors import SparsePosteriors


def posteriors_like_speech(frames: int, num_units: int, seed: int) -> SparsePosteriors:
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(0, 1, (frames, num_units)), axis=0).astype(np.float32)
    walk -= walk.max(1, keepdims=True)
    return SparsePosteriors.from_dense(walk - np.log(np.exp(walk).sum(1, keepdims=True)), 20, 0.999)


@st.composite
def any_posteriors(draw: st.DrawFn) -> SparsePosteriors:
    shape = draw(st.tuples(st.integers(1, 12), st.sampled_from([1, 2, 30, 400])))
    logits = draw(npst.arrays(np.float32, shape, elements=st.floats(-30, 30, width=32), fill=st.just(0.0)))
    logits = logits - logits.max(1, keepdims=True)
    dense = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return SparsePosteriors.from_dense(dense, draw(st.integers(1, 255)), draw(st.sampled_from([0.5, 0.99, 0.999, 1.0])))


@given(original=any_posteriors(), levels=st.sampled_from([8, 128, 255]))
def test_round_trip(original: SparsePosteriors, levels: int) -> None:
    data = codec.encode(original, levels)
    decoded = codec.decode(data)
    assert codec.encode(original, levels) == data
    assert decoded.num_units == original.num_units
    np.testing.assert_array_equal(decoded.counts, original.counts)
    total = np.add.reduceat(np.exp(decoded.log_probs.astype(np.float64)), decoded.starts) + decoded.tail
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)
    np.testing.assert_array_equal(decoded.tail > 0, original.tail > 0)
    for start, count in zip(original.starts, original.counts, strict=True):
        mine, theirs = (
            dict(zip(p.units[start : start + count].tolist(), p.log_probs[start : start + count], strict=True))
            for p in (decoded, original)
        )
        assert decoded.units[start] == original.units[start]  # the most probable unit
        assert mine.keys() == theirs.keys()
        order = [mine[unit] for unit in theirs]
        assert order == sorted(order, reverse=True)
        assert np.all(np.diff(decoded.log_probs[start : start + count]) <= 0)


@pytest.mark.parametrize("levels", [32, 128, 255])
def test_probabilities_are_within_the_stated_error(levels: int) -> None:
    original = posteriors_like_speech(200, 300, 0)
    decoded = codec.decode(codec.encode(original, levels))
    (units, probs), (again, approximate) = original.padded(20), decoded.padded(20)
    dense, other = np.zeros((200, 300)), np.zeros((200, 300))
    np.put_along_axis(dense, units, probs, 1)
    np.put_along_axis(other, again, approximate, 1)
    # half a step of the root each, one more for the lifted first, and the renormalisation
    assert np.abs(np.sqrt(dense) - np.sqrt(other)).max() < 2.5 / levels


def test_alignments_are_exact_and_tiny() -> None:
    ids = np.repeat(np.arange(30) % 7, 10)
    original = SparsePosteriors.from_alignment(ids, 20)
    data = codec.encode(original)
    decoded = codec.decode(data)
    np.testing.assert_array_equal(decoded.units, ids)
    assert np.all(decoded.log_probs == 0) and np.all(decoded.tail == 0)
    assert len(data) / len(ids) < 0.5


@given(logits=npst.arrays(np.float32, (5, 40), elements=st.floats(-9, 0, width=32)), draws=st.integers(1, 255))
def test_draws_are_exact(logits: np.ndarray, draws: int) -> None:
    dense = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    original = SparsePosteriors.sampled(dense, draws, np.random.default_rng(0))
    decoded = codec.decode(codec.encode(original, draws=draws))
    np.testing.assert_array_equal(decoded.units, original.units)
    np.testing.assert_allclose(decoded.log_probs, original.log_probs, atol=1e-6)
    assert not decoded.tail.any()


def test_shares_that_are_no_draws_are_not_written() -> None:
    original = SparsePosteriors.from_dense(np.log(np.array([[0.6, 0.4]], np.float32)), 2)
    assert codec.decode(codec.encode(original, draws=5)).units.tolist() == [0, 1]
    with pytest.raises(ValueError, match="not counts of 7 draws"):
        codec.encode(original, draws=7)


def test_a_vector_of_version_2_stays_readable() -> None:
    """Three draws in a frame, two of unit 3 and one of unit 1, of five units; then three of unit 1."""
    decoded = codec.decode(bytes.fromhex(DRAWS))
    assert decoded.counts.tolist() == [2, 1] and decoded.units.tolist() == [3, 1, 1]
    np.testing.assert_allclose(np.exp(decoded.log_probs), [2 / 3, 1 / 3, 1], rtol=1e-6)


def test_long_and_wide() -> None:
    ids = np.arange(300_000) % 65536
    ids[100:200_000] = 65535
    decoded = codec.decode(codec.encode(SparsePosteriors.from_alignment(ids, 65536)))
    np.testing.assert_array_equal(decoded.units, ids)


@pytest.mark.parametrize(("frames", "num_units"), [(127, 65536), (128, 1 << 16), (255, 65535), (256, 65536), (600, 3)])
def test_frames_and_units_fill_their_bits(frames: int, num_units: int) -> None:
    """Units held to the last frame and begun in the first one stay apart, and numbers of several bytes come back."""
    rng = np.random.default_rng(0)
    first, second = np.sort(rng.integers(0, num_units - 1, 3)), num_units - 1
    units = np.stack([np.full(frames, second), first[np.arange(frames) * 3 // frames]], 1).astype(np.int32)
    log_probs = np.log(np.tile(np.array([0.6, 0.4], np.float32), (frames, 1)))
    counts, tail = np.full(frames, 2, np.uint8), np.zeros(frames, np.float32)
    decoded = codec.decode(codec.encode(SparsePosteriors(counts, units.ravel(), log_probs.ravel(), tail, num_units)))
    np.testing.assert_array_equal(decoded.units.reshape(frames, 2), units)
    np.testing.assert_allclose(decoded.log_probs, log_probs.ravel(), atol=0.02)


def test_a_vector_of_version_1_stays_readable() -> None:
    """Written down when version 1 was made: two frames over five units, 128 levels; every later program reads it."""
    data = bytes.fromhex(VECTOR)
    decoded = codec.decode(data)
    assert decoded.num_units == 5
    assert decoded.counts.tolist() == [2, 1]
    assert decoded.units.tolist() == [3, 0, 3]
    first, second = 107**2 + 65**2 + 26**2, 127**2 + 18**2
    np.testing.assert_allclose(np.exp(decoded.log_probs), [107**2 / first, 65**2 / first, 127**2 / second], rtol=1e-6)
    np.testing.assert_allclose(decoded.tail, [26**2 / first, 18**2 / second], rtol=1e-6)


VECTOR = "414b44500180040002000000020000000200000043a00ef9636062000146c76c11a91f00"


DRAWS = "414b4450020004000200000002000000020000004eb5077163646400024606462626060600"


def read_by_the_readme(data: bytes) -> list[list[tuple[int, float]]]:
    """A plain reader, written from README.md alone: (unit, probability) of every frame, the tail last as unit -1."""
    _, _, _, _, frames, distinct, runs, crc = struct.unpack("<4sBBHIIII", data[:24])
    assert zlib.crc32(data[:20] + bytes(4) + data[24:]) == crc
    raw = iter(zlib.decompress(data[24:], -15))

    def varint() -> int:
        value = shift = 0
        for byte in raw:
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        return value

    units, unit = [], -1
    for _ in range(distinct):
        unit += varint() + 1
        units.append(unit)
    run_counts = [varint() + 1 for _ in range(distinct)]
    gaps = [varint() for _ in range(runs)]
    lengths = [varint() + 1 for _ in range(runs)]
    firsts = [next(raw) for _ in range(runs)]
    changes = iter([next(raw) for _ in range(sum(lengths) - runs)])
    codes: list[list[tuple[int, int]]] = [[] for _ in range(frames)]
    run = 0
    for unit, count in zip(units, run_counts, strict=True):
        frame = 0
        for _ in range(count):
            frame += gaps[run]
            code = firsts[run]
            for position in range(lengths[run]):
                code = (code + (next(changes) if position else 0)) % 256
                codes[frame].append((-code, unit))
                frame += 1
            run += 1
    tail, result = 0, []
    for entries in codes:
        tail = (tail + next(raw)) % 256
        total = sum(code * code for code, _ in entries) + tail * tail
        kept = [(unit, code * code / total) for code, unit in sorted(entries)]
        result.append([*kept, (-1, tail * tail / total)])
    assert next(raw, None) is None
    return result


@given(original=any_posteriors())
def test_the_readme_says_all_that_a_reader_needs(original: SparsePosteriors) -> None:
    data = codec.encode(original)
    decoded, plain = codec.decode(data), read_by_the_readme(data)
    assert [unit for frame in plain for unit, _ in frame[:-1]] == decoded.units.tolist()
    np.testing.assert_allclose([p for frame in plain for _, p in frame[:-1]], np.exp(decoded.log_probs), rtol=1e-5)
    np.testing.assert_allclose([frame[-1][1] for frame in plain], decoded.tail, rtol=1e-6)


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_bytes_are_refused(data: st.DataObject) -> None:
    good = bytearray(codec.encode(posteriors_like_speech(20, 50, 1)))
    bad = bytearray(good)
    match data.draw(st.sampled_from(["flip", "cut", "grow", "splice"])):
        case "flip":
            for _ in range(data.draw(st.integers(1, 4))):
                bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del bad[data.draw(st.integers(0, len(bad) - 1)) :]
        case "grow":
            bad += data.draw(st.binary(min_size=1, max_size=9))
        case "splice":
            at = data.draw(st.integers(0, len(bad) - 1))
            bad[at : at + 5] = data.draw(st.binary(max_size=9))
    if bad == good:
        return
    with pytest.raises(UserError, match="utt-1: "):
        codec.decode(bytes(bad), "utt-1")


def same(one: SparsePosteriors, other: SparsePosteriors) -> bool:
    arrays = zip(
        (one.counts, one.units, one.log_probs, one.tail),
        (other.counts, other.units, other.log_probs, other.tail),
        strict=True,
    )
    return one.num_units == other.num_units and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in arrays
    )


@given(st.lists(any_posteriors(), max_size=5), st.booleans())
def test_several_are_decoded_as_each_by_itself(several: list[SparsePosteriors], of_one_kind: bool) -> None:
    if of_one_kind:
        several = [one for one in several if one.num_units == several[0].num_units]
    members = [(f"utt-{number}", codec.encode(one)) for number, one in enumerate(several)]
    for (name, data), target in zip(members, codec.decode_all(members), strict=True):
        assert same(target, codec.decode(data, name))


def test_the_damaged_one_of_several_is_named() -> None:
    good = codec.encode(posteriors_like_speech(20, 50, 1))
    too_long = forge(bytes([0, 0, 0, 30, 1]) + bytes(30 + 20), version=2)  # a run of 31 frames in an utterance of 20
    with pytest.raises(UserError, match="utt-1: damaged \\(impossible frames\\)"):
        codec.decode_all([("utt-0", good), ("utt-1", too_long), ("utt-2", good)])


def forge(raw: bytes, **header: int) -> bytes:
    """A message with a right checksum around whatever is inside."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    body = packer.compress(raw) + packer.flush()
    fields = {"version": 1, "levels": 128, "last_unit": 49, "frames": 20, "distinct": 1, "runs": 1} | header
    head = codec._HEADER.pack(codec.MAGIC, *fields.values(), 0)
    return head[:-4] + zlib.crc32(body, zlib.crc32(head)).to_bytes(4, "little") + body


@settings(max_examples=300)
@given(data=st.data())
def test_forged_content_is_decoded_into_something_consistent_or_refused(data: st.DataObject) -> None:
    small = st.integers(0, 6)
    distinct, runs, frames = data.draw(small), data.draw(small), data.draw(small)
    raw = data.draw(st.lists(small, min_size=2 * (distinct + runs), max_size=40).map(bytes) | st.binary(max_size=60))
    message = forge(raw, frames=frames, distinct=distinct, runs=runs, last_unit=data.draw(small))
    try:
        decoded = codec.decode(message)
    except UserError:
        return
    assert decoded.frames == frames and decoded.counts.min() >= 1
    assert len(decoded.units) == len(decoded.log_probs) == decoded.counts.sum(dtype=int)
    assert decoded.units.min() >= 0 and decoded.units.max() < decoded.num_units
    assert np.isfinite(decoded.log_probs).all() and np.isfinite(decoded.tail).all()
    for units in np.split(decoded.units, decoded.starts[1:]):
        assert len(set(units.tolist())) == len(units)


@pytest.mark.parametrize(
    "header",
    [
        {"frames": 2**32 - 1},
        {"frames": 2**24 - 1},
        {"frames": 0},
        {"version": 1, "levels": 0},
        {"runs": 2**31},
        {"distinct": 2**31},
    ],
)
def test_lying_headers_allocate_nothing(header: dict[str, int]) -> None:
    with pytest.raises(UserError, match="impossible header"):
        codec.decode(forge(bytes(30), **header))


def test_a_bomb_is_not_unpacked() -> None:
    with pytest.raises(UserError, match="damaged"):
        codec.decode(forge(bytes(50_000_000)))


def test_a_newer_version_is_named() -> None:
    with pytest.raises(UserError, match="version 3, this program reads 2; use a newer asr_kd"):
        codec.decode(forge(b"", version=3), "shard: utt")
    with pytest.raises(UserError, match="not a soft target"):
        codec.decode(b"RIFFxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.array([1, 1], np.uint8)}, "do not fit"),
        ({"units": np.array([0, 9, 1], np.int32)}, "outside 0 to 4"),
        ({"log_probs": np.log(np.array([0.3, 0.6, 0.9], np.float32))}, "not sorted"),
        ({"tail": np.array([0.5, 0.1], np.float32)}, "add up to 1"),
        ({"tail": np.array([np.nan, 0.1], np.float32)}, "add up to 1"),
        ({"num_units": 70000}, "out of bounds"),
        ({"units": np.array([2, 2, 1], np.int32)}, "a unit twice"),
    ],
)
def test_contradictions_are_not_written(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "counts": np.array([2, 1], np.uint8),
        "units": np.array([0, 2, 1], np.int32),
        "log_probs": np.log(np.array([0.6, 0.3, 0.9], np.float32)),
        "tail": np.array([0.1, 0.1], np.float32),
        "num_units": 5,
    }
    codec.encode(SparsePosteriors(**fields))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        codec.encode(SparsePosteriors(**(fields | change)))  # type: ignore[arg-type]
