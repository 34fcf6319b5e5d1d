"""Readers fed with damaged bytes: the right data or one clear error, in bounded memory and time; never anything else."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import UserError
from asr_kd.files import hash_json, sha256_file
from asr_kd.shards.tarset import Sample, read_checked, read_index, read_shard, write_index, write_shard
from asr_kd.targets import codec
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import (
    CodecDescription,
    Selection,
    Statistics,
    TargetMetadata,
    read_target_shard,
    write_target_shard,
)
from tests.joining import join

#: bytes that reading may take at any moment, whatever the input says of itself
BOUND = 64 << 20
BLOCK = tarfile.BLOCKSIZE


def posteriors(frames: int, num_units: int, seed: int) -> SparsePosteriors:
    walk = np.cumsum(np.random.default_rng(seed).normal(0, 1, (frames, num_units)), axis=0).astype(np.float32)
    walk -= walk.max(1, keepdims=True)
    return SparsePosteriors.from_dense(walk - np.log(np.exp(walk).sum(1, keepdims=True)), 20, 0.999)


def same(one: SparsePosteriors, other: SparsePosteriors) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def damaged(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """The data with some bytes changed, cut, put in, taken out, moved, or taken from another of its kind."""
    bad = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(bad) + 1)
        length = rng.choice((1, 2, 4, 8, 24, BLOCK, rng.randrange(len(bad) + 1)))
        match rng.randrange(9):
            case 0 | 1 if bad:
                bad[at % len(bad)] ^= 1 << rng.randrange(8)
            case 2:
                bad[at : at + length] = rng.randbytes(length)
            case 3:
                bad[at:at] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
            case 4:
                del bad[at : at + length]
            case 5:
                del bad[at:]
            case 6:
                bad[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                bad[at : at + length] = other[start : start + length]
            case 8:  # two stretches change places, on the borders of blocks where there are some
                unit = BLOCK if len(bad) >= 4 * BLOCK else 1
                one, two = sorted(unit * rng.randrange(len(bad) // unit + 1) for _ in range(2))
                length = min(length if unit == 1 else unit * rng.randint(1, 3), two - one, len(bad) - two)
                bad[one : one + length], bad[two : two + length] = bad[two : two + length], bad[one : one + length]
        if not bad:
            break
    return bytes(bad)


def fed(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None for a UserError of one line; in bounded memory."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        result = read()
    except UserError as error:
        assert "\n" not in str(error)
        result = None
    assert tracemalloc.get_traced_memory()[1] - before < BOUND
    return result


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def messages() -> list[SparsePosteriors]:
    rng = np.random.default_rng(0)
    return [
        posteriors(60, 40, 0),
        posteriors(7, 300, 1),
        posteriors(1, 2, 2),
        SparsePosteriors.from_alignment(rng.integers(0, 30, 90).repeat(4), 30),
        SparsePosteriors.from_dense(np.log(rng.dirichlet([0.1] * 60, 30).astype(np.float32) + 1e-9), 255),
    ]


def test_damaged_soft_targets(count: int = 4000, seed: int = 0) -> None:
    rng = random.Random(seed)
    originals = messages()
    good = [codec.encode(original) for original in originals]
    decoded = [codec.decode(data) for data in good]
    for _ in range(count):
        number = rng.randrange(len(good))
        bad = damaged(rng, good[number], good)
        found = fed(lambda bad=bad: codec.decode(bad, "u"))
        if found is not None:
            whole = [same(found, decoded[other]) for other, data in enumerate(good) if data == bad]
            assert whole == [True]


def resealed(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A soft target damaged below its checksum: in the header's fields or in what is packed, the checksum put right."""
    fields = list(codec._HEADER.unpack_from(data))
    body = data[codec._HEADER.size :]
    if rng.randrange(3):
        raw = [zlib.decompress(other[codec._HEADER.size :], -15) for other in [data, *others]]
        raw[0] = damaged(rng, raw[0], raw)
        packer = zlib.compressobj(rng.choice((1, 9)), zlib.DEFLATED, -15)
        body = packer.compress(raw[0]) + packer.flush()
        body += rng.choice((b"", b"", b"", b"\0", body))
    elif rng.randrange(2):
        body = damaged(rng, body, [other[codec._HEADER.size :] for other in others])
    if rng.randrange(2):
        at = rng.randrange(2, 7)
        top = (None, None, 255, 65535, 2**32 - 1, 2**32 - 1, 2**32 - 1)[at]
        wild = rng.choice((0, 1, top, rng.randrange(top + 1), fields[at] + 1, fields[at] - 1, fields[at] * 2))
        fields[at] = min(max(wild, 0), top)
    header = codec._HEADER.pack(*fields[:-1], 0)
    return header[:-4] + struct.pack("<I", zlib.crc32(body, zlib.crc32(header))) + body


def test_soft_targets_damaged_below_their_checksum(count: int = 4000, seed: int = 0) -> None:
    rng = random.Random(seed)
    good = [codec.encode(original) for original in messages()]
    accepted = 0
    for _ in range(count):
        bad = resealed(rng, rng.choice(good), good)
        found = fed(lambda bad=bad: codec.decode(bad, "u"))
        if found is None:
            continue
        accepted += 1
        assert len(found.units) == len(found.log_probs) == found.counts.sum(dtype=int)
        assert found.counts.min() >= 1 and found.units.min() >= 0 and found.units.max() < found.num_units
        total = np.add.reduceat(np.exp(found.log_probs.astype(np.float64)), found.starts) + found.tail
        np.testing.assert_allclose(total, 1.0, rtol=1e-4)
        keys = np.repeat(np.arange(found.frames), found.counts) * found.num_units + found.units
        assert len(np.unique(keys)) == len(keys), "a unit twice in a frame"
    assert accepted > count // 50, "the damage does not reach what lies below the checksum"


@dataclasses.dataclass
class Pair:
    """An audio shard and its soft targets, and what reading them gives."""

    audio: Path
    targets: Path
    keys: list[str]
    decoded: dict[str, SparsePosteriors]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    keys = ["a", "b", "größe", "d", "e"]
    audio = folder / "audio" / "shard-000000.tar"
    audio.parent.mkdir()
    infos = [
        write_shard(audio, [Sample(key, rng.bytes(300), "flac", {"seconds": 0.5, "text": "one"}) for key in keys]),
        write_shard(audio.with_name("shard-000001.tar"), [Sample("z", b"", "wav", {})]),
    ]
    write_index(audio.parent, infos)
    targets = folder / "shard-000000.tar"
    values = {key: posteriors(12, 30, number) for number, key in enumerate(keys) if key != "d"}
    statistics = Statistics(
        utterances=4, frames=48, audio_seconds=2.0, entries_per_frame=4.0, bytes_per_frame=9.0, mean_kept_mass=0.99,
        mean_kl=0.1, worst_kl=0.2, top1_kept=1.0,
    )  # fmt: skip
    metadata = TargetMetadata(
        codec=CodecDescription(version=codec.VERSION, levels=codec.LEVELS), selection=Selection(mode="mass", k=20, mass=0.999),
        teacher="feed", units_hash="abcd", num_units=30, frame_ms=30, features=FeatureSettings(),
        audio_sha256=sha256_file(audio), quarantined={"d": "empty"}, statistics=statistics,
    )  # fmt: skip
    write_target_shard(targets, metadata, values.items())
    decoded = dict(read_target_shard(targets)[1])
    return Pair(audio, targets, [key for key in keys if key != "d"], decoded)


def with_checksums(data: bytes) -> bytes:
    """A tar whose headers' checksums are put right, as far as one follows another."""
    bad, at = bytearray(data), 0
    while at + BLOCK <= len(bad):
        header = bad[at : at + BLOCK]
        header[148:156] = b" " * 8
        bad[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        digits = bytes(header[124:135]).strip(b"\0 ")
        size = int(digits, 8) if digits and not digits.strip(b"01234567") else 0
        at += BLOCK * (1 + -(-size // BLOCK))
        if not any(header[:100]):
            bad[at - BLOCK : at] = data[at - BLOCK : at]
            break
    return bytes(bad)


def test_damaged_shards_of_soft_targets(pair: Pair, tmp_path: Path, count: int = 1200, seed: int = 0) -> None:
    rng = random.Random(seed)
    good = pair.targets.read_bytes()
    sha256 = sha256_file(pair.audio)
    path = tmp_path / "shard-000000.tar"
    for _ in range(count):
        bad = damaged(rng, good, [good, pair.audio.read_bytes()])
        if rng.randrange(2):
            bad = with_checksums(bad)
        path.write_bytes(bad)
        found = fed(lambda: list(join(pair.audio, path, audio_sha256=sha256, units_hash="abcd", num_units=30, frame_ms=30)))  # fmt: skip
        if found is not None:
            assert [sample.key for sample, _ in found] == pair.keys
            assert all(same(target, pair.decoded[sample.key]) for sample, target in found), "wrong data passed as right"


def test_soft_targets_that_changed_places_are_found(pair: Pair, tmp_path: Path) -> None:
    """Each is whole, and the shard's utterances and frames are as many as before."""
    data = bytearray(pair.targets.read_bytes())
    with tarfile.open(pair.targets) as tar:
        one, two = tar.getmembers()[1:3]
    assert one.size <= BLOCK and two.size <= BLOCK
    first, second = (slice(member.offset, member.offset_data + BLOCK) for member in (one, two))
    data[first], data[second] = data[second], data[first]
    names = [slice(part.start, part.start + 100) for part in (first, second)]
    data[names[0]], data[names[1]] = data[names[1]], data[names[0]]
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(with_checksums(bytes(data)))
    with pytest.raises(UserError, match=r"damaged .soft targets that are whole are not this shard's own"):
        list(join(pair.audio, path))


def any_json(rng: random.Random, depth: int = 0) -> Any:
    values = (
        None, True, 0, -1, 1, 10**6, 2**63, -(10**30), 1.5, float("nan"), float("inf"), "", "x", "0" * 64, "\ud800", "../x.tar",
        "a" * 3000, [], {},
    )  # fmt: skip
    if depth < 3 and not rng.randrange(4):
        inner = [any_json(rng, depth + 1) for _ in range(rng.randrange(4))]
        return inner if rng.randrange(2) else {f"k{number}": value for number, value in enumerate(inner)}
    return rng.choice(values)


def changed_json(rng: random.Random, value: Any) -> Any:
    """Somewhere in it another value, a key more, or one less."""
    if not isinstance(value, dict | list) or not value or not rng.randrange(4):
        return any_json(rng)
    value = value.copy()
    at = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match rng.randrange(5):
        case 0:
            del value[at]
        case 1 if isinstance(value, dict):
            value[rng.choice(("version", "samples", "x", "tail_prior", "quarantined"))] = any_json(rng)
        case _:
            value[at] = changed_json(rng, value[at])
    return value


def test_soft_targets_with_changed_metadata(pair: Pair, tmp_path: Path, count: int = 1500, seed: int = 0) -> None:
    rng = random.Random(seed)
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(pair.targets) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    original = json.loads(members[0][1])
    del original["checksum"]
    for _ in range(count):
        value = changed_json(rng, original)
        if isinstance(value, dict):
            try:
                value = value | {"checksum": hash_json(value)}
            except UnicodeEncodeError:
                value["checksum"] = "0"
        text = json.dumps(value, ensure_ascii=bool(rng.randrange(2)))
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in [(members[0][0], text.encode("utf-8", "surrogatepass")), *members[1:]]:
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
        path.write_bytes(data.getvalue())
        found = fed(lambda: list(join(pair.audio, path, units_hash="abcd", num_units=30, frame_ms=30)))
        if found is not None:
            assert [sample.key for sample, _ in found] == pair.keys
            assert all(same(target, pair.decoded[sample.key]) for sample, target in found)


def test_damaged_shards_of_audio(pair: Pair, tmp_path: Path, count: int = 800, seed: int = 0) -> None:
    rng = random.Random(seed)
    good = pair.audio.read_bytes()
    (info, _), expected = read_index(pair.audio.parent), list(read_shard(pair.audio))
    path = tmp_path / pair.audio.name

    for _ in range(count):
        bad = damaged(rng, good, [good, pair.targets.read_bytes()])
        if rng.randrange(2):
            bad = with_checksums(bad)
        path.write_bytes(bad)
        fed(lambda: list(read_shard(path)))
        found = fed(lambda: list(read_checked(tmp_path, info)))
        assert found is None or (bad == good and found == expected)


def test_damaged_indexes(pair: Pair, tmp_path: Path, count: int = 1200, seed: int = 0) -> None:
    rng = random.Random(seed)
    path = tmp_path / "index.json"
    good = (pair.audio.parent / "index.json").read_bytes()
    for _ in range(count):
        if rng.randrange(2):
            path.write_bytes(damaged(rng, good, [good, pair.targets.read_bytes()]))
        else:
            path.write_text(json.dumps(changed_json(rng, json.loads(good))))
        for info in fed(lambda: read_index(tmp_path)) or []:
            assert Path(info.name).name == info.name and info.name.endswith(".tar") and len(info.sha256) == 64
            assert info.samples >= 0 and 0 <= info.seconds < np.inf and info.bytes >= 0
            fed(lambda info=info: list(read_checked(pair.audio.parent, info)))
