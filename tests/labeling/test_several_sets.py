"""Sets that were made apart, and tars that others wrote, under a teacher."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings, VerifySettings
from asr_kd.labeling.verify import verify
from asr_kd.shards.indexing import index
from asr_kd.shards.manifest import write_transcripts
from asr_kd.shards.settings import IndexSettings
from asr_kd.shards.tarset import read_index
from asr_kd.targets.store import read_target_shard
from tests.labeling.conftest import flac, utterance, write_audio

Job = Callable[..., LabelSettings]


@pytest.fixture
def theirs(tmp_path: Path) -> str:
    """The index of a tar as WebDataset's examples have it."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "part.0.tar", "w") as file:
        for name, data in (("x/u.0.flac", flac(0.7, 1)), ("x/v.flac", flac(0.8, 2)), ("x/v.txt", b"one two")):
            header = tarfile.TarInfo(name.replace("u.0", "u"))
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    index(IndexSettings(audio=str(tmp_path / "tars"), output=str(tmp_path / "theirs")))
    return str(tmp_path / "theirs")


def test_targets_lie_under_the_names_of_the_joined_set(job: Job, audio: Path, theirs: str, tmp_path: Path) -> None:
    other = str(write_audio(tmp_path / "other", [[utterance("o", 0.9, 77)]]))
    sets = [str(audio), other, theirs]
    label(job(audio=sets))
    joined = read_index(sets)
    assert sorted(path.name for path in (tmp_path / "targets").glob("*.tar")) == sorted(joined.names)
    for one in sets:
        output = tmp_path / f"targets-{Path(one).name}"
        label(job(audio=[one], output=str(output), loader_workers=1))
        for info in read_index(one):
            name = next(other.name for other in joined if other.sha256 == info.sha256)
            assert (output / info.name).read_bytes() == (tmp_path / "targets" / name).read_bytes()
    keys = [key for key, _ in read_target_shard(tmp_path / "targets" / "part_0.tar")[1]]
    assert keys == ["x-u", "x-v"]
    settings = VerifySettings.model_validate(
        {"targets": str(tmp_path / "targets"), "audio": sets, "teacher": job().teacher, "device": "cpu"}
    )
    assert verify(settings)


def test_texts_of_others_can_be_aligned_to(job: Job, theirs: str, tmp_path: Path) -> None:
    label(job(audio=theirs, mode="alignment", max_bad_share=0.5))
    metadata, targets = read_target_shard(tmp_path / "targets" / "part_0.tar")
    assert [key for key, _ in targets] == ["x-v"]
    assert metadata.quarantined == {"x-u": "no text to align to"}


def test_another_order_of_the_sets_is_another_job(job: Job, audio: Path, theirs: str) -> None:
    label(job(audio=[str(audio), theirs]))
    with pytest.raises(
        UserError, match=r"belongs to other settings \(audio: .* \+ .* does not hold what this output was made from"
    ):
        label(job(audio=[theirs, str(audio)]))


def test_texts_that_two_utterances_would_share_are_refused(job: Job, audio: Path, tmp_path: Path) -> None:
    other = str(write_audio(tmp_path / "other", [[utterance("s1-u0", 0.9, 77)]]))
    write_transcripts(tmp_path / "texts.jsonl", [(f"s{number // 4}-u{number % 4}", "two") for number in range(12)])
    texts = str(tmp_path / "texts.jsonl")
    shared = (
        r"^transcripts \S+: s1-u0 is the key of two utterances, in \S+-000001\.tar and in \S+/other/\S+-000000\.tar"
    )
    with pytest.raises(UserError, match=shared):
        label(job(audio=[str(audio), other], mode="alignment", transcripts=texts))
    assert not (tmp_path / "targets").exists()
    label(job(audio=str(audio), mode="alignment", transcripts=texts))
    settings = {"targets": str(tmp_path / "targets"), "teacher": job().teacher, "device": "cpu", "transcripts": texts}
    with pytest.raises(UserError, match=shared):
        verify(VerifySettings.model_validate({**settings, "audio": [str(audio), other]}))
