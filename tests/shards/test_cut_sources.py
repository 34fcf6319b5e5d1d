"""Long recordings of every kind of manifest, and in stores, cut at their pauses: killed at every file, by one process and by two, the same bytes."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile

from asr_kd.files import Place, place
from asr_kd.objects import ObjectPath
from asr_kd.shards.manifests import open_manifest
from asr_kd.shards.manifests.kinds import Kind
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import read_index
from tests.shards.manifests.laid_out import RATE, lines, tar, write

S3 = Any
Dying = Callable[[int], AbstractContextManager[None]]
NAMES = ("a", "b", "c", "d")


def talk(seed: int) -> bytes:
    """Two noises with pauses around them, 4 s in all; of seed 2 the pauses alone, and of seed 3 no audio."""
    sound = np.random.default_rng(seed).normal(0, 0.0005, 4 * RATE)
    for start in (1.0, 2.5 + seed / 10) if seed != 2 else ():
        here = slice(round(start * RATE), round((start + 0.7) * RATE))
        sound[here] += np.random.default_rng(seed).normal(0, 0.1, len(sound[here]))
    file = io.BytesIO()
    soundfile.write(file, sound, RATE, format="FLAC")
    return file.getvalue() if seed != 3 else b"RIFF"


def common_voice(folder: Path) -> Path:
    for seed, name in enumerate(NAMES):
        write(folder / "clips" / f"{name}.flac", talk(seed))
    rows = "".join(f"s{seed}\t{name}.flac\tsaid {seed}\n" for seed, name in enumerate(NAMES))
    return write(folder / "train.tsv", "client_id\tpath\tsentence\n" + rows)


def parquet(folder: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part, seeds in enumerate(((0, 1, 2), (3,))):
        audio = [{"bytes": talk(seed), "path": f"{NAMES[seed]}.flac"} for seed in seeds]
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table({"audio": audio, "speaker": list(seeds)}), folder / f"train-{part}-of-2.parquet", row_group_size=2)  # fmt: skip
    return folder


def shar(folder: Path) -> Path:
    recording = {"id": "r", "sources": [{"type": "shar", "channels": [0], "source": ""}]}
    for part, seeds in enumerate(((0, 1), (2, 3))):
        lines(folder / f"cuts.{part}.jsonl", *({"id": NAMES[seed], "type": "MonoCut", "start": 0, "duration": 4.0, "recording": recording} for seed in seeds))  # fmt: skip
        tar(folder / f"recording.{part}.tar", *((f"{NAMES[seed]}.flac", talk(seed)) for seed in seeds))
    return folder


def tars(folder: Path) -> Path:
    for part, seeds in enumerate(((0, 1, 2), (3,))):
        tar(folder / f"{part}.tar", *(one for seed in seeds for one in ((f"{NAMES[seed]}.json", json.dumps({"speaker": seed})), (f"{NAMES[seed]}.flac", talk(seed)))))  # fmt: skip
    return folder


def audiofolder(folder: Path) -> Path:
    """With the bounds of a part."""
    common_voice(folder)
    (folder / "clips").rename(folder / "sound")
    (folder / "train.tsv").unlink()
    rows = "".join(f"sound/{name}.flac,0.5,3.75\n" for name in NAMES)
    return write(folder / "metadata.csv", "file_name,start,end\n" + rows)


def kaldi(folder: Path) -> Path:
    for seed, name in enumerate(NAMES):
        write(folder / f"{name}.flac", talk(seed))
    write(folder / "wav.scp", "".join(f"{name} {name}.flac\n" for name in NAMES))
    write(folder / "segments", "".join(f"{name}-{part} {name} {part} {part + 2}\n" for name in NAMES for part in (0, 2)))  # fmt: skip
    return folder


def audio(folder: Path) -> Path:
    for seed, name in enumerate(NAMES):
        write(folder / f"{name}.flac", talk(seed))
    return folder


KINDS = {
    Kind.COMMON_VOICE: common_voice, Kind.PARQUET: parquet, Kind.SHAR: shar, Kind.TARS: tars, Kind.AUDIOFOLDER: audiofolder, Kind.KALDI: kaldi, Kind.AUDIO: audio,
}  # fmt: skip


def cut(manifest: Place | str, output: Place | str, **changes: Any) -> None:
    segment = {"detector": "energy", "recordings_per_shard": 1}
    values = {"manifest": str(manifest), "output": str(output), "segment": segment, "max_bad_share": 0.3, "drop_text": True}  # fmt: skip
    prepare(PrepareSettings.model_validate(values | changes))


def tree(output: Place) -> dict[str, bytes]:
    """All that must be the same whoever worked, and however often."""
    if isinstance(output, ObjectPath):
        store = fsspec.filesystem(output.protocol, use_listings_cache=False)
        found = {path.partition(f"{output.path}/")[2]: store.cat_file(path) for path in store.find(str(output))}
    else:
        found = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith("timing.json")}


def check_whole(output: Path, said: str) -> None:
    """Of four recordings one is silent, and one is none."""
    assert "; 3 recordings cut: " in said or "; 6 recordings cut: " in said
    lines_in = 8 if "8 lines in" in said else 4
    assert f"{lines_in} lines in = {lines_in // 2} used + {lines_in // 2} quarantined ({lines_in // 4} of them without speech)" in said  # fmt: skip
    assert sum(one.samples for one in read_index(output)) == 4
    listed = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert len(listed) == lines_in // 2


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_killed_at_every_publish(
    tmp_path: Path, kind: Kind, dying_at_publish: Dying, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = KINDS[kind](tmp_path / "set")
    assert open_manifest(manifest).kind is kind
    cut(manifest, tmp_path / "whole")
    check_whole(tmp_path / "whole", capsys.readouterr().out)
    expected = tree(tmp_path / "whole")
    for stop in range(len(expected)):
        output = tmp_path / f"killed-{stop}"
        with dying_at_publish(stop):
            cut(manifest, output)
        assert not (output / "index.json").exists()
        cut(manifest, output)
        assert tree(output) == expected


@contextmanager
def dying_at_request(stop: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Within it the job is interrupted in place of writing its object of this number, from 0 on; yields the names of those that it writes."""
    from fsspec.implementations.memory import MemoryFileSystem

    written: list[str] = []

    def dying(name: str) -> Callable[..., object]:
        real = getattr(MemoryFileSystem, name)

        def write(store: Any, one: Any, other: Any, **options: Any) -> object:
            if len(written) == stop:
                raise KeyboardInterrupt
            written.append(other if name == "put_file" else one)
            return real(store, one, other, **options)

        return write

    with monkeypatch.context() as patched:
        for name in ("put_file", "pipe_file"):
            patched.setattr(MemoryFileSystem, name, dying(name))
        yield written


IN_STORES = [kind for kind in KINDS if kind is not Kind.PARQUET]


@pytest.mark.parametrize("kind", IN_STORES, ids=lambda kind: kind.name)
def test_in_a_store_killed_at_every_object(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    manifest = KINDS[kind](tmp_path / "set")
    cut(manifest, tmp_path / "whole")
    expected = tree(tmp_path / "whole")
    for path in (tmp_path / "set").rglob("*"):
        if path.is_file():
            store.pipe_file(f"/bucket/{kind.name}/set/{path.relative_to(tmp_path / 'set')}", path.read_bytes())
    base = f"memory://bucket/{kind.name}"
    url = f"{base}/{manifest.relative_to(tmp_path)}"
    with dying_at_request(-1, monkeypatch) as written:
        cut(url, f"{base}/whole")
    alone, expected = expected, tree(place(f"{base}/whole"))
    assert {name: data.replace(base.encode(), os.fsencode(tmp_path)) for name, data in expected.items()} == alone
    for stop in range(len(written)):
        output = place(f"{base}/killed-{stop}")
        with dying_at_request(stop, monkeypatch), pytest.raises(KeyboardInterrupt):
            cut(url, output)
        cut(url, output)
        assert tree(output) == expected


@pytest.mark.parametrize("kind", [Kind.COMMON_VOICE, Kind.PARQUET, Kind.SHAR, Kind.TARS], ids=lambda kind: kind.name)
def test_by_two_workers(tmp_path: Path, kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = KINDS[kind](tmp_path / "set")
    cut(manifest, tmp_path / "one")
    cut(manifest, tmp_path / "two", workers=2)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_by_two_workers_in_s3_of_which_one_is_killed(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "copies").mkdir()
    manifest = s3.upload(tars(tmp_path / "set"), "set")
    cut(manifest, f"{s3.url}/one")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "copies"))
    alive = [True]

    def kill(*_: str) -> None:
        """The first worker that asks for a recording."""
        workers = multiprocessing.active_children()
        if alive and workers:
            alive.clear()
            workers[0].kill()

    s3.fault = lambda method, path: kill() if method == "GET" and path.endswith(".tar") else None
    cut(manifest, f"{s3.url}/two", workers=2)
    assert tree(place(f"{s3.url}/two")) == tree(place(f"{s3.url}/one")) and not alive
    assert not list((tmp_path / "copies").iterdir())
