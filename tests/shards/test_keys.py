"""Keys that utterances of joined sets share."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.shards import keys
from asr_kd.shards.indexing import index
from asr_kd.shards.keys import check_keys
from asr_kd.shards.settings import IndexSettings
from asr_kd.shards.tarset import Sample, ShardInfo, read_index, read_keys, write_index, write_shard


def write_set(folder: Path, *shards: str) -> str:
    """Shards with an utterance of each of these letters."""
    folder.mkdir()
    infos = []
    for number, letters in enumerate(shards):
        samples = [Sample(one, f"{folder.name} {one}".encode(), "flac", {"seconds": 1.0}) for one in letters]
        infos.append(write_shard(folder / f"shard-{number:06d}.tar", samples))
    write_index(folder, infos)
    return str(folder)


def test_a_shared_key_is_named_with_both_shards_if_it_matters(tmp_path: Path) -> None:
    audio = [write_set(tmp_path / "a", "xy", "z"), write_set(tmp_path / "b", "uv", "wy")]
    with pytest.raises(
        UserError,
        match=r"^texts\.jsonl: y is the key of two utterances, in \S+/a/shard-000000\.tar and in \S+/b/shard-000001\.tar, and texts go by "
        r"the key alone; take each set by itself, with its own texts, or ",
    ):
        check_keys(audio, read_index(audio), "texts.jsonl")
    check_keys(audio, read_index(audio), "texts.jsonl", {"x", "z", "w"}.__contains__)


def test_a_set_of_prepare_and_one_shard_of_any_set_need_no_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "read_keys", None)
    audio = write_set(tmp_path / "a", "xy", "z")
    other = write_set(tmp_path / "b", "", "")
    for one in (audio, [audio], [audio, other]):
        assert read_index(one).keys_differ
        check_keys(one, read_index(one), "texts.jsonl")
    assert not read_index([audio, write_set(tmp_path / "c", "y")]).keys_differ


def test_index_looks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = [write_set(tmp_path / "a", "xy", "z"), write_set(tmp_path / "b", "uv")]
    whole = str(tmp_path / "set")
    index(IndexSettings.model_validate({"audio": audio, "output": whole}))
    assert not read_index(whole).keys_differ
    index(build(IndexSettings, {"audio": audio, "output": whole, "keys": True, "loader_workers": 1}, "test"))
    assert json.loads((tmp_path / "set" / "index.json").read_text())["keys"] == "differ"
    monkeypatch.setattr(keys, "read_keys", None)
    check_keys(whole, read_index(whole), "texts.jsonl")
    assert read_index(whole).hash == read_index(audio).hash
    assert read_index(whole)[:2].keys_differ and read_index([whole]).keys_differ
    assert not read_index([whole, write_set(tmp_path / "c", "s")]).keys_differ, "of the others it knows nothing"


def test_index_refuses_shared_keys_only_when_it_is_asked(tmp_path: Path) -> None:
    audio = [write_set(tmp_path / "a", "xy"), write_set(tmp_path / "b", "y")]
    wanted = {"audio": audio, "output": str(tmp_path / "set")}
    with pytest.raises(UserError, match=r"y is the key of two utterances, in \S+/a/shard-000000\.tar and in \S+/b/"):
        index(IndexSettings.model_validate({**wanted, "keys": True}))
    assert not (tmp_path / "set").exists()
    index(IndexSettings.model_validate(wanted))
    assert len(read_index(tmp_path / "set")) == 2


def theirs(folder: Path, tars: dict[str, list[str]]) -> str:
    """Tars of others, of members with these names."""
    folder.mkdir()
    sound = (Path(__file__).parents[2] / "data_manifests" / "digits").glob("*.tar")
    with tarfile.open(min(sound)) as file:
        flac = next(file.extractfile(one).read() for one in file if one.name.endswith(".flac"))  # type: ignore[union-attr]
    for tar, names in tars.items():
        with tarfile.open(folder / tar, "w") as file:
            for name in names:
                data = flac if name.lower().endswith(".flac") else b"text"
                header = tarfile.TarInfo(name)
                header.size = len(data)
                file.addfile(header, io.BytesIO(data))
    return str(folder)


def test_tars_of_others_may_share_keys_among_themselves(tmp_path: Path) -> None:
    tars = theirs(tmp_path / "tars", {"0.tar": ["d/0.FLAC", "d/0.txt", "README"], "1.tar": ["d/0.flac", "./d/1.flac"]})
    whole = str(tmp_path / "set")
    index(IndexSettings(audio=tars, output=whole))
    infos = read_index(whole)
    assert [list(read_keys(whole, info)) for info in infos] == [["d-0"], ["d-0", "d-1"]]
    with pytest.raises(UserError, match=r"d-0 is the key of two utterances, in \S+/0\.tar and in \S+/1\.tar"):
        check_keys(whole, infos, "texts.jsonl")
    with pytest.raises(UserError, match=r"d-0 is the key of two utterances, in \S+/tars/0\.tar and in \S+/tars/1\.tar"):
        index(IndexSettings(audio=tars, output=whole, keys=True))
    (tmp_path / "tars" / "1.tar").unlink()
    theirs(tmp_path / "more", {"2.tar": ["d/1.flac"]})
    (tmp_path / "more" / "2.tar").rename(tmp_path / "tars" / "2.tar")
    index(IndexSettings(audio=tars, output=whole, keys=True))
    assert read_index(whole).keys_differ
    index(IndexSettings(audio=tars, output=whole))
    assert not read_index(whole).keys_differ


def test_what_lies_in_a_store_is_not_fetched_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "read_keys", None)
    audio = ["memory://joined/a", "memory://joined/b"]
    for one in audio:
        write_index(one, [ShardInfo("shard-000000.tar", 1, 1.0, 10240, ("a" if one.endswith("a") else "b") * 64)])
    with pytest.raises(UserError, match=r"by `asr-kd index audio=\[memory://joined/a,memory://joined/b\] .*keys=true`"):
        check_keys(audio, read_index(audio), "texts.jsonl")
