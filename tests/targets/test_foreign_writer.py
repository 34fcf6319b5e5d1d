"""A writer and a reader of soft targets from the words of README.md alone, with nothing of ours: they and ours read each other."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.targets import codec
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import TargetMetadata, read_target_shard, tail_prior, write_target_shard

README = (Path(codec.__file__).parent / "README.md").read_text(encoding="utf-8")
#: of each frame the codes of its units, and the tail code
Frames = list[tuple[dict[int, int], int]]
TINY: Frames = [({0: 120, 2: 40}, 18), ({0: 122}, 38), ({0: 70, 3: 100}, 0), ({2: 128}, 0)]
HEADER = "<4sBBHIIII"


# ---- theirs


def varint(number: int) -> bytes:
    data = b""
    while number >= 128:
        data += bytes([number % 128 + 128])
        number //= 128
    return data + bytes([number])


def their_member(frames: Frames, num_units: int, levels: int = 128, packed: bool = False) -> bytes:
    ids, run_counts, gaps, lengths, firsts, changes = [], [], [], [], [], []
    for unit in sorted({unit for kept, _ in frames for unit in kept}):
        ids.append(unit)
        run_counts.append(0)
        end = 0  # of the unit's run before
        for frame, (kept, _) in enumerate(frames):
            if unit not in kept:
                continue
            if frame and unit in frames[frame - 1][0]:
                changes.append((kept[unit] - frames[frame - 1][0][unit]) % 256)
                lengths[-1] += 1
            else:
                gaps.append(frame - end)
                firsts.append(kept[unit])
                lengths.append(1)
                run_counts[-1] += 1
            end = frame + 1
    tails = [tail for _, tail in frames]
    numbers = [
        *(unit - before - 1 for unit, before in zip(ids, [-1, *ids], strict=False)),
        *(count - 1 for count in run_counts), *gaps, *(length - 1 for length in lengths),
    ]  # fmt: skip
    raw = b"".join(map(varint, numbers)) + bytes(firsts) + bytes(changes)
    raw += bytes((tail - before) % 256 for tail, before in zip(tails, [0, *tails], strict=False))
    if packed:
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = packer.compress(raw) + packer.flush()
    else:
        body = b"\1" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw
    fields = [b"AKDP", 2, levels, num_units - 1, len(frames), len(ids), len(firsts)]
    return struct.pack(HEADER, *fields, zlib.crc32(struct.pack(HEADER, *fields, 0) + body)) + body


def their_shard(members: dict[str, bytes], about: dict[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for key, data in members.items():
        digest.update(f"{key} {len(data)}\n".encode() + data)
    value = {**about, "members": digest.hexdigest()}
    line = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    value["checksum"] = hashlib.sha256(line.encode()).hexdigest()[:16]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        files = {
            "metadata.json": json.dumps(value).encode(),
            **{f"{key}.target": data for key, data in members.items()},
        }
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def their_frames(data: bytes) -> tuple[int, int, Frames]:
    """Levels, number of units and frames of a member."""
    magic, version, levels, last, count, distinct, runs, crc = struct.unpack_from(HEADER, data)
    assert (magic, version) == (b"AKDP", 2)
    assert crc == zlib.crc32(data[:20] + bytes(4) + data[24:])
    raw, at, numbers = zlib.decompress(data[24:], -15), 0, []
    while len(numbers) < 2 * (distinct + runs):
        number = shift = 0
        while True:
            number |= (raw[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if raw[at - 1] < 128:
                break
        numbers.append(number)
    of_units, of_runs = numbers[: 2 * distinct], numbers[2 * distinct :]
    entries = sum(of_runs[runs:]) + runs
    firsts, changes, tails = raw[at : at + runs], iter(raw[at + runs : at + entries]), raw[at + entries :]
    frames: Frames = []
    for change in tails:
        frames.append(({}, (change + (frames[-1][1] if frames else 0)) % 256))
    unit, run = -1, 0
    for step, more in zip(of_units[:distinct], of_units[distinct:], strict=True):
        unit, frame = unit + step + 1, 0
        for _ in range(more + 1):
            frame, code = frame + of_runs[run], firsts[run]
            for number in range(of_runs[runs + run] + 1):
                code = (code + next(changes)) % 256 if number else code
                frames[frame][0][unit] = code
                frame += 1
            run += 1
    assert len(frames) == count
    return levels, last + 1, frames


# ---- the words


def block(number: int) -> str:
    """A code block of the section on foreign writers."""
    section = README.partition("## A writer of one's own")[2].partition("\n## ")[0]
    return re.findall(r"```(?:json|hex)\n(.*?)```", section, re.DOTALL)[number]


def test_the_readmes_member_is_what_its_words_make() -> None:
    assert their_member(TINY, 5) == bytes.fromhex(block(0))
    assert their_frames(bytes.fromhex(block(0))) == (128, 5, TINY)
    target = codec.decode(bytes.fromhex(block(0)))
    assert target.counts.tolist() == [2, 1, 2, 1]
    assert target.units.tolist() == [0, 2, 0, 3, 0, 2]
    total = 120**2 + 40**2 + 18**2
    assert np.exp(target.log_probs[:2]) == pytest.approx([120**2 / total, 40**2 / total])
    assert target.tail[0] == pytest.approx(18**2 / total)


def test_the_readmes_shard_is_read(tmp_path: Path) -> None:
    line = block(1).strip()
    about = json.loads(line)
    assert json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=False) == line
    member = bytes.fromhex(block(0))
    assert about.pop("members") == hashlib.sha256(b"u1 %d\n" % len(member) + member).hexdigest()
    checksum = hashlib.sha256(line.encode()).hexdigest()[:16]
    assert f"`{checksum}`" in README
    (tmp_path / "x.tar").write_bytes(their_shard({"u1": member}, about))
    metadata, targets = read_target_shard(tmp_path / "x.tar", about["units_hash"], 5, 30)
    assert [(key, target.frames) for key, target in targets] == [("u1", 4)]
    assert metadata.quarantined == {"u2": "empty (0 bytes)"}
    assert metadata.statistics.mean_kept_mass == pytest.approx(1 - float(codec.decode(member).tail.mean()), abs=1e-6)
    assert tail_prior(tmp_path / "x.tar", metadata) == pytest.approx(np.full(5, 0.2))
    again = {key: value for key, value in metadata.model_dump().items() if key in about}
    assert json.dumps(again, sort_keys=True) == json.dumps(about, sort_keys=True)


def test_what_the_readme_says_of_numbers(tmp_path: Path) -> None:
    """A writer in another language may spell a number otherwise than the checksum wants: that is found."""
    about = json.loads(block(1))
    del about["members"]
    good = their_shard({"u1": bytes.fromhex(block(0))}, about)
    assert good.count(b'"entries_per_frame": 1.5,') == 1
    for text, fine in ((b'"entries_per_frame":1.50,', True), (b'"entries_per_frame":1.51,', False)):
        (tmp_path / "x.tar").write_bytes(good.replace(b'"entries_per_frame": 1.5,', text))
        if fine:
            list(read_target_shard(tmp_path / "x.tar")[1])
        else:
            with pytest.raises(UserError, match="the checksum differs"):
                read_target_shard(tmp_path / "x.tar")


# ---- theirs and ours read each other


@st.composite
def any_frames(draw: st.DrawFn) -> tuple[Frames, int]:
    num_units = draw(st.sampled_from([1, 3, 200, 65536]))
    units = st.integers(0, num_units - 1)
    kept = st.dictionaries(units, st.integers(1, 255), min_size=1, max_size=5)
    frames = draw(
        st.lists(st.tuples(kept, st.integers(0, 255)), min_size=1, max_size=300 if draw(st.booleans()) else 6)
    )
    return [(dict(sorted(one.items())), tail) for one, tail in frames], num_units


@given(any_frames(), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_we_read_what_they_write(written: tuple[Frames, int], packed: bool) -> None:
    frames, num_units = written
    target = codec.decode(their_member(frames, num_units, 255, packed))
    assert (target.frames, target.num_units) == (len(frames), num_units)
    for frame, (kept, tail) in enumerate(frames):
        one = target[frame : frame + 1]
        total = sum(code**2 for code in kept.values()) + tail**2
        best_first = sorted(kept, key=lambda unit: (-kept[unit], unit))
        assert one.units.tolist() == best_first
        assert np.exp(one.log_probs) == pytest.approx([kept[unit] ** 2 / total for unit in best_first], rel=1e-5)
        assert one.tail[0] == pytest.approx(tail**2 / total, rel=1e-5)


@given(st.integers(0, 1 << 32), st.integers(1, 600), st.sampled_from([2, 40, 3000]))
@settings(deadline=None, max_examples=30)
def test_they_read_what_we_write(seed: int, count: int, num_units: int) -> None:
    dense = np.random.default_rng(seed).dirichlet(np.full(num_units, 0.05), count).astype(np.float32) + 1e-9
    target = SparsePosteriors.from_dense(np.log(dense / dense.sum(1, keepdims=True)), 9, 0.99)
    levels, units, frames = their_frames(codec.encode(target))
    assert (levels, units) == (128, num_units)
    codes, tails = codec.rounded(target, 128)
    assert [kept for kept, _ in frames] == [
        dict(sorted(zip(one.units.tolist(), of_frame.tolist(), strict=True)))
        for one, of_frame in zip(
            (target[frame : frame + 1] for frame in range(count)), np.split(codes, target.starts[1:]), strict=True
        )
    ]
    assert [tail for _, tail in frames] == tails.tolist()


def test_they_check_a_shard_of_ours(tmp_path: Path) -> None:
    about = json.loads(block(1))
    about["tail_prior"] = base64.b64encode(bytes(range(5))).decode()
    metadata = TargetMetadata.model_validate({**about, "teacher": "größer"})
    write_target_shard(tmp_path / "x.tar", metadata, [("u1", codec.decode(bytes.fromhex(block(0))))])
    with tarfile.open(tmp_path / "x.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(files) == ["metadata.json", "u1.target"]
    value, data = json.loads(files["metadata.json"]), files["u1.target"]
    checksum = value.pop("checksum")
    line = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert checksum == hashlib.sha256(line.encode()).hexdigest()[:16]
    assert value["members"] == hashlib.sha256(f"u1 {len(data)}\n".encode() + data).hexdigest()
    # codes scaled to 128² a frame: 70² + 100² were less
    assert their_frames(data)[2] == [*TINY[:2], ({0: 73, 3: 105}, 0), TINY[3]]
