from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.files import place
from asr_kd.shards import ranges
from asr_kd.shards.manifest import Span, Utterance, read_manifest
from asr_kd.shards.manifests import Manifest, as_line, from_line, open_manifest
from asr_kd.shards.ranges import Plan, Source, make_plan, remove_plan
from tests.shards.manifests.laid_out import lines, tar, write

FORK = multiprocessing.get_context("fork")
LINES = 23


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """One that was left alone for long enough."""
    path = tmp_path / "list.jsonl"
    lines = ({"key": f"k{number}", "audio": f"a/{number}.wav", "n": number} for number in range(LINES))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(path, (1e9, 1e9))
    return path


def planned(manifest: Path, output: Path, size: int = 4, check: Callable[[], None] = lambda: None) -> Plan:
    source = Source.found(manifest, output)
    return make_plan(source, output, {"manifest": source.hash, "size": size}, size, check)


@pytest.mark.parametrize(
    ("line", "claim", "hinted"),
    [
        ({"txt": "one two"}, {}, True),
        ({"txt": "one two"}, {"drop_text": True}, False),
        ({"txt": 3}, {}, False),
        ({"txt": "one two", "text": "one two"}, {}, False),
        ({"speaker": "s"}, {}, False),
    ],
)
def test_a_field_that_may_be_the_text_is_named_where_no_line_has_text(
    line: dict[str, Any], claim: dict[str, Any], hinted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "typo.jsonl"
    path.write_text(json.dumps({"audio": "a.wav", **line}) + "\n")
    source = Source.found(path, tmp_path / "out")
    assert make_plan(source, tmp_path / "out", {"manifest": source.hash, **claim}, 4, lambda: None).total == 1
    hint = f"{path}: no line has text; the first has txt: call it text"
    assert (hint in capsys.readouterr().err.splitlines()) == hinted


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which manifests were read, and hashed."""
    found: list[str] = []
    for owner, name in ((Manifest, "read"), (ranges, "sha256_file")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, real=real, name=name: found.append(name) or real(*given))
    return found


@pytest.mark.parametrize(("size", "together"), [(1, 3), (4, 8), (4, 1), (23, 1), (500, 40)])
def test_ranges_are_the_manifest_in_order(
    manifest: Path, tmp_path: Path, size: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "UTTERANCES", size * together)
    plan = planned(manifest, tmp_path / "out", size)
    parts = [plan.read(number) for number in plan.ranges]
    assert [utterance for part in parts for utterance in part] == list(read_manifest(manifest))
    assert [len(part) for part in parts] == [plan.count(number) for number in plan.ranges]
    assert plan.total == LINES and all(len(part) == size for part in parts[:-1])
    assert planned(manifest, tmp_path / "out", size) == plan  # as it was found again
    remove_plan(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("damage", ["", "half", "{", "[1, 2]"])
def test_a_damaged_plan_loses_nothing_silently(manifest: Path, tmp_path: Path, damage: str) -> None:
    plan = planned(manifest, tmp_path / "out")
    (path,) = (tmp_path / "out" / ".plan").glob("0*.jsonl")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if damage == "half" else damage)
    with pytest.raises(UserError, match=r"000000\.jsonl: is damaged; remove .*\.plan, and run the command again"):
        plan.read(5)


NAMES = st.text(st.characters(exclude_characters="/\0"), min_size=1).filter(lambda name: name not in (".", ".."))
BASES = st.sampled_from([".", "a", "a/b", "/", "/data/x", "s3://bucket", "s3://bucket/x"])
AUDIO = st.one_of(
    NAMES, st.builds("{}/{}".format, NAMES, NAMES), st.just("."), st.just("../x.wav"), st.just("a/b"), st.just("/data/x/y.wav"),
    st.just("/data/xy.wav"), st.just("s3://bucket/x/y.wav"), st.just("gs://other/x"),
)  # fmt: skip


@given(
    BASES, AUDIO, st.none() | st.text(st.characters(exclude_categories=())),
    st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists)),
    st.floats(0, 1e6), st.none() | st.floats(0, 1e6),
)  # fmt: skip
def test_an_utterance_comes_back_as_it_was(
    base: str, audio: str, text: str | None, fields: dict[str, Any], start: float, end: float | None
) -> None:
    folder = place(base)
    named = place(audio) if "://" in audio else Path(audio)
    utterance = Utterance("k", folder / audio if named == Path(audio) else named, text, fields, Span(start, end))
    line = as_line(utterance, folder)
    assert line.count("\n") == 1 and line.endswith("\n")
    assert from_line(line, folder) == utterance


def test_paths_count_from_the_manifest_wherever_a_process_stands(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned(Path("list.jsonl"), tmp_path / "out")
    monkeypatch.chdir("/")
    assert planned(manifest, tmp_path / "out").read(0)[0].audio == tmp_path / "a/0.wav"


def test_a_manifest_is_read_and_hashed_once(manifest: Path, tmp_path: Path, reads: list[str]) -> None:
    for _ in range(3):
        planned(manifest, tmp_path / "out")
    assert reads == ["sha256_file", "read"]
    stat = manifest.stat()
    manifest.write_text(manifest.read_text().replace("k7", "q7"))
    os.utime(manifest, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # of the same size, and nearly of the same time
    assert planned(manifest, tmp_path / "out").read(1)[3].key == "q7"


def test_a_file_that_was_just_written_is_hashed_again(manifest: Path, tmp_path: Path, reads: list[str]) -> None:
    os.utime(manifest)  # another change in the same moment would leave size and time as they are
    planned(manifest, tmp_path / "out")
    planned(manifest, tmp_path / "out")
    assert reads == ["sha256_file", "read", "sha256_file"]


def test_a_folder_is_known_by_all_of_its_files(tmp_path: Path) -> None:
    """Also those behind a link, by which what is read is found."""
    for name in ("a/b/x.wav", "a/y.wav", "elsewhere/z.wav"):
        write(tmp_path / name, "1")
    (tmp_path / "a" / "c").symlink_to(tmp_path / "elsewhere")
    states = [ranges._state(open_manifest(tmp_path / "a"))]
    assert ranges._state(open_manifest(tmp_path / "a")) == states[0]
    os.utime(tmp_path / "a/b/x.wav", (1, 1))
    states.append(ranges._state(open_manifest(tmp_path / "a")))
    os.utime(tmp_path / "elsewhere/z.wav", (2, 2))
    states.append(ranges._state(open_manifest(tmp_path / "a")))
    (tmp_path / "a/b/x.wav").rename(tmp_path / "a/b/z.wav")
    states.append(ranges._state(open_manifest(tmp_path / "a")))
    assert len(set(map(str, states))) == 4


SEVERAL = [
    *(f"kaldi {name}" for name in ("wav.scp", "segments", "text", "utt2spk", "utt2lang", "spk2gender")),
    "supervisions", "shar cuts", "librispeech", "audiofolder",
]  # fmt: skip


def of_several_files(folder: Path) -> dict[str, tuple[Path, Path, str, str]]:
    """Kinds of manifests that are read from several files: what is named, and in another file something that it says and could say."""
    supervision = {"id": "s", "recording_id": "r", "start": 0, "duration": 1, "text": "one"}
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "r.wav"}]}
    cut = {"id": "c", "type": "MonoCut", "start": 0, "duration": 1, "recording": recording}
    lines(folder / "lhotse/supervisions.jsonl", supervision)
    lines(folder / "lhotse/recordings.jsonl", recording)
    lines(folder / "shar/cuts.0.jsonl", cut)
    tar(folder / "shar/recording.0.tar", ("c.wav", b"123"))
    for name, content in {
        "wav.scp": "r r.wav", "segments": "u r 0 1", "text": "u one", "utt2spk": "u s", "utt2lang": "u de", "spk2gender": "s f"
    }.items():  # fmt: skip
        write(folder / "kaldi" / name, content + "\n")
    write(folder / "speech/a/1.trans.txt", "1-2-3 one\n")
    write(folder / "speech/a/1-2-3.flac", "1")
    write(folder / "named/metadata.csv", "file_name,text\na.wav,one\n")
    write(folder / "named/a.wav", "1")
    kaldi = {f"kaldi {name}": (folder / "kaldi", folder / "kaldi" / name, old, new) for name, old, new in [
        ("wav.scp", "r.wav", "q.wav"), ("segments", "0 1", "0 2"), ("text", "one", "two"), ("utt2spk", "u s", "u t"), ("utt2lang", "de", "nl"), ("spk2gender", "s f", "s m"),
    ]}  # fmt: skip
    return {
        **kaldi,
        "supervisions": (folder / "lhotse/supervisions.jsonl", folder / "lhotse/recordings.jsonl", "r.wav", "q.wav"),
        "shar cuts": (folder / "shar", folder / "shar/cuts.0.jsonl", '"duration": 1', '"duration": 2'),
        "librispeech": (folder / "speech", folder / "speech/a/1.trans.txt", "one", "two"),
        "audiofolder": (folder / "named", folder / "named/metadata.csv", "one", "two"),
    }


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_change_in_any_file_of_a_manifest_is_noticed(tmp_path: Path, kind: str) -> None:
    manifest, other, old, new = of_several_files(tmp_path)[kind]
    for path in manifest.parent.rglob("*"):
        os.utime(path, (1e9, 1e9))
    before = Source.found(manifest, tmp_path / "out")
    make_plan(before, tmp_path / "out", {"manifest": before.hash}, 4, lambda: None)
    assert Source.found(manifest, tmp_path / "out") == before
    other.write_text(other.read_text().replace(old, new))
    assert Source.found(manifest, tmp_path / "out").hash != before.hash


def test_a_change_while_it_is_read_is_noticed(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(of: Manifest, _: object) -> Iterator[Utterance]:
        yield from read_manifest(of.path)
        os.utime(manifest)

    monkeypatch.setattr(Manifest, "read", changing)
    with pytest.raises(UserError, match=r"list\.jsonl: was changed while it was read; run the command again"):
        planned(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_other_settings_is_replaced_unless_the_folder_is_taken(manifest: Path, tmp_path: Path) -> None:
    def taken() -> None:
        raise UserError("taken")

    plan = planned(manifest, tmp_path / "out", 4)
    assert plan.ranges == range(6)
    with pytest.raises(UserError, match="taken"):
        planned(manifest, tmp_path / "out", 5, taken)
    assert planned(manifest, tmp_path / "out", 4, taken) == plan
    assert planned(manifest, tmp_path / "out", 5).ranges == range(5)


@pytest.mark.parametrize("wrong", ['{"key": "k3", "audio": "x"}', "{"])
def test_a_wrong_manifest_leaves_nothing_and_what_was_there(manifest: Path, tmp_path: Path, wrong: str) -> None:
    with open(manifest, "a") as file:
        file.write(wrong)
    (tmp_path / "mine").mkdir()
    for output in (tmp_path / "new", tmp_path / "mine"):
        with pytest.raises(UserError, match=rf"list\.jsonl, line {LINES + 1}: "):
            planned(manifest, output)
    assert not (tmp_path / "new").exists() and not list((tmp_path / "mine").iterdir())


def start(work: Callable[[], object]) -> Any:
    process = FORK.Process(target=work)
    process.start()
    return process


@pytest.mark.parametrize("right", [True, False])
def test_of_several_processes_one_plans(
    manifest: Path, tmp_path: Path, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the manifest is wrong each says so, one after the other."""
    if not right:
        manifest.write_text(manifest.read_text() + "{")
    monkeypatch.setattr(ranges, "WAIT", 0.02)

    def slow(of: Manifest, _: object) -> Iterator[Utterance]:
        with open(tmp_path / "log", "a") as log:
            log.write("read\n")
        time.sleep(0.2)
        yield from read_manifest(of.path)

    def work() -> None:
        if right:
            assert planned(manifest, tmp_path / "out").total == LINES
        else:
            with pytest.raises(UserError, match=f"line {LINES + 1}: "):
                planned(manifest, tmp_path / "out")

    monkeypatch.setattr(Manifest, "read", slow)
    processes = [start(work) for _ in range(3)]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 3
    assert (tmp_path / "log").read_text().count("read") == (1 if right else 3)
    assert not list((tmp_path / "out").rglob(".leases"))


def test_a_planner_that_is_killed_is_followed(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "UTTERANCES", 4)
    expected = planned(manifest, tmp_path / "whole")
    for some in range(0, LINES, 5):

        def dying(of: Manifest, _: object, some: int = some) -> Iterator[Utterance]:
            yield from itertools.islice(read_manifest(of.path), some)
            os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patched:
            patched.setattr(Manifest, "read", dying)
            process = start(lambda: planned(manifest, tmp_path / "out"))
            process.join(300)
        assert process.exitcode == -signal.SIGKILL
        plan = planned(manifest, tmp_path / "out")
        assert [plan.read(number) for number in plan.ranges] == [expected.read(number) for number in expected.ranges]
        names = [sorted(path.name for path in (tmp_path / name / ".plan").iterdir()) for name in ("out", "whole")]
        assert names[0] == names[1]
        remove_plan(tmp_path / "out")


def test_memory_does_not_grow_with_the_manifest(tmp_path: Path) -> None:
    """200,000 lines, which as objects take 130 MB."""
    with open(tmp_path / "list.jsonl", "w") as file:
        file.writelines(f'{{"audio": "a", "key": "key-of-an-utterance-{number}"}}\n' for number in range(200_000))
    mine, theirs = FORK.Pipe(duplex=False)

    def work() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        plan = planned(tmp_path / "list.jsonl", tmp_path / "out", 500)
        assert len(plan.read(399)) == 500
        theirs.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = start(work)
    theirs.close()
    assert mine.recv() < 32  # MB
    process.join(300)
