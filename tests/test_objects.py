from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from asr_kd import files, objects
from asr_kd.errors import UserError
from asr_kd.files import (
    claim_folder,
    create,
    names_in,
    place,
    read_json,
    read_text,
    sha256_file,
    write_json,
    write_whole,
)
from asr_kd.objects import ObjectPath

S3 = Any


@pytest.fixture(params=["memory", "s3"])
def folder(request: pytest.FixtureRequest) -> Iterator[ObjectPath]:
    if request.param == "s3":
        yield ObjectPath.parse(request.getfixturevalue("s3").url) / "deep/folder"
    else:
        yield ObjectPath.parse(f"memory://{uuid.uuid4().hex}/folder")


def test_a_url_is_taken_apart_like_a_path() -> None:
    path = place("s3://bucket/set/shard-000001.tar")
    assert isinstance(path, ObjectPath) and str(path) == "s3://bucket/set/shard-000001.tar"
    assert (path.name, path.stem, path.suffix) == ("shard-000001.tar", "shard-000001", ".tar")
    assert str(path.parent / "index.json") == "s3://bucket/set/index.json"
    assert place("s3://bucket/set/") == path.parent and place(path) is path
    for text in ("shards/a", "/shards/a", "a:b"):
        assert place(text) == Path(text)
    with pytest.raises(UserError, match="names no bucket"):
        place("s3://")


def test_files_go_round(folder: ObjectPath, tmp_path: Path) -> None:
    assert not folder.exists() and not folder.is_dir() and list(names_in(folder)) == []
    with write_whole(folder / "a.txt", "w") as file:
        file.write("grün")
        assert not (folder / "a.txt").exists()
    write_json(str(folder / "more" / "b.json"), {"b": [1, None]})
    assert (folder / "a.txt").is_file() and not (folder / "a.txt").is_dir()
    assert folder.exists() and folder.is_dir() and not folder.is_file() and not (folder / "a").exists()
    assert sorted(names_in(folder)) == ["a.txt", "more"]
    assert read_text(folder / "a.txt") == "grün" and read_json(str(folder / "more" / "b.json")) == {"b": [1, None]}
    assert (folder / "a.txt").stat().st_size == 5 and (folder / "a.txt").read_bytes(2) == b"gr"
    (tmp_path / "a").write_text("grün")
    assert sha256_file(folder / "a.txt") == sha256_file(tmp_path / "a")
    with (folder / "a.txt").fetched() as copy:
        assert copy.read_text() == "grün"
    assert not copy.exists()
    (folder / "a.txt").unlink()
    (folder / "a.txt").unlink(missing_ok=True)
    assert not (folder / "a.txt").exists()
    with pytest.raises(UserError, match=r"a\.txt: no such list; check the path"):
        read_text(folder / "a.txt", "list")


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_what_was_there_stays_when_writing_fails(folder: ObjectPath, failure: type[BaseException]) -> None:
    (folder / "a").write(b"old")
    with pytest.raises(failure), write_whole(folder / "a", "w") as file:
        file.write("half")
        raise failure
    assert (folder / "a").read_bytes() == b"old" and list(names_in(folder)) == ["a"]


def test_one_of_many_creates(folder: ObjectPath) -> None:
    won: list[str] = []

    def attempt(name: str) -> None:
        if create(folder / "a", name):
            won.append(name)

    threads = [threading.Thread(target=attempt, args=(str(number),)) for number in range(8)]
    if folder.protocol == "memory":  # its own check and write are not one step
        threads = threads[:1]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and read_text(folder / "a") == won[0]
    assert not create(folder / "a", "late")


def test_a_claim_holds_against_other_jobs_and_settings(folder: ObjectPath) -> None:
    claim_folder(folder, "label", {"k": 8})
    claim_folder(str(folder), "label", {"k": 8})
    with pytest.raises(UserError, match=r"folder: belongs to other settings \(k was 8, now 9\)"):
        claim_folder(folder, "label", {"k": 9})
    (folder / "job.json").unlink()
    (folder / "holiday.jpg").write(b"")
    with pytest.raises(UserError, match="is not empty and was not written by"):
        claim_folder(folder, "label", {})


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "lose the answer"])
def test_what_passes_is_tried_again(s3: S3, quick: None, fault: int | str) -> None:
    path = place(f"{s3.url}/a")
    for method, action in {
        "PUT": lambda: write_json(path, 1), "HEAD": lambda: path.exists(), "GET": lambda: read_json(path),
        "DELETE": lambda: path.unlink(), "GET ": lambda: list(names_in(path.parent)),
    }.items():  # fmt: skip
        s3.failing(3, fault, method.strip())
        before = len(s3.requests)
        action()
        assert len(s3.requests) > before + 3
    assert not path.exists()


def test_a_download_that_was_cut_is_made_again(s3: S3, quick: None) -> None:
    data = bytes(range(256)) * 1000
    path = ObjectPath.parse(f"{s3.url}/a")
    path.write(data)
    s3.failing(2, "cut the answer", "GET")
    with path.fetched() as copy:
        assert copy.read_bytes() == data
    s3.failing(2, "cut the answer", "GET")
    assert path.read_bytes() == data and path.read_bytes(1000) == data[:1000]


def test_an_object_that_was_created_although_the_answer_was_lost_is_ours(s3: S3, quick: None) -> None:
    s3.failing(1, "lose the answer", "PUT")
    assert create(f"{s3.url}/a", "mine")
    s3.failing(1, 503, "PUT")
    assert not create(f"{s3.url}/a", "other")


@pytest.mark.parametrize(("fault", "said"), [(503, "out of order"), ("cut", "")])
def test_a_store_that_stays_away_is_named(s3: S3, quick: None, fault: int | str, said: str) -> None:
    s3.fault = lambda *_: fault
    with pytest.raises(
        UserError, match=f"a: the store failed 10 times, at last with: .*{said}.* run the command again"
    ) as caught:
        write_json(f"{s3.url}/a", 1)
    assert str(caught.value).startswith(s3.url) and "\n" not in str(caught.value)
    s3.fault = lambda *_: None
    assert not place(f"{s3.url}/a").exists()


def test_nothing_listens(s3: S3, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="the store failed 10 times"):
        read_text(f"{s3.url}/a")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (503, "the store failed 10 times"),
        (0, "the store failed 10 times"),
        (403, "access denied"),
        (404, "no such file"),
    ],
)
def test_what_a_web_server_does_not_say_is_not_missing(quick: None, status: int, said: str) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        do_HEAD = do_GET
        log_message = lambda *_: None  # type: ignore[assignment]  # noqa: E731

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1] if status else 1}/a"
        with pytest.raises(UserError, match=f"{url}: {said}"):
            if place(url).exists() or status == 404:
                read_text(url)
        server.shutdown()


def test_a_large_object_is_there_whole_or_not_at_all(s3: S3, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 << 20)
    data = bytes(11 << 20)
    s3.fault = lambda method, path: 500 if method == "PUT" and "partNumber=2" in path else None
    with pytest.raises(UserError, match="the store failed 10 times"), write_whole(f"{s3.url}/a") as file:
        file.write(data)
    s3.fault = lambda *_: None
    assert not place(f"{s3.url}/a").exists()
    store = objects._store(ObjectPath.parse(s3.url))
    assert "Uploads" not in store.call_s3("list_multipart_uploads", Bucket=s3.url.removeprefix("s3://"))
    s3.failing(1, 500, "PUT", "partNumber=2")
    with write_whole(f"{s3.url}/a") as file:
        file.write(data)
    with place(f"{s3.url}/a").fetched() as copy:  # type: ignore[union-attr]
        assert copy.read_bytes() == data


def test_a_listing_goes_over_all_pages(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ObjectPath.parse(f"{s3.url}/set")
    for number in range(7):
        (folder / f"{number}").write(b"")
    (folder / "below" / "x").write(b"")
    import s3fs

    real = s3fs.S3FileSystem.call_s3
    monkeypatch.setattr(
        s3fs.S3FileSystem, "call_s3", lambda self, *words, **more: real(self, *words, **more, MaxKeys=3)
    )
    before = len(s3.requests)
    assert sorted(folder.names()) == [*map(str, range(7)), "below"]
    assert len(s3.requests) == before + 3


def test_what_the_user_can_mend_is_said(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for action in (read_text, lambda url: create(url, ""), lambda url: list(names_in(place(url)))):
        with pytest.raises(UserError, match=r"^s3://no-such/a: there is no such bucket; make it"):
            action("s3://no-such/a")
    s3.fault = lambda *_: 403
    for action in (read_text, lambda url: write_json(url, 1), lambda url: place(url).exists()):
        with pytest.raises(UserError, match=r"a: access denied \(.*\); check the credentials"):
            action(f"{s3.url}/a")
    s3.fault = lambda *_: None
    with pytest.raises(UserError, match="the store refused the request"):
        read_text("s3://not a bucket/a")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="no credentials for this store were found"):
        read_text(f"{s3.url}/a")


def test_other_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="hps:// is not known; use a local path, s3:// or gs://"):
        read_text("hps://host/a")
    with pytest.raises(UserError, match="ftp:// is not read here; fetch the file first: wget ftp://host/a"):
        read_text("ftp://host/a")
    with pytest.raises(UserError, match="http:// is only read here"):
        write_json("http://host/a", 1)
    with pytest.raises(UserError, match=r"output: s3://b/a: must be on a local disk"):
        files.local("s3://b/a", "output")

    def not_installed(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", not_installed)
    with pytest.raises(UserError, match=r"s3:// needs the extra asr-kd\[s3\]; pip install 'asr-kd\[s3\]'"):
        read_text("s3://bucket/a")


def test_a_full_local_disk_is_named(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"no space left for a copy of s3://.*/a; free some, or set TMPDIR"):
        write_json(f"{s3.url}/a", 1)


def test_optional_modules_stay_out_until_they_are_needed() -> None:
    code = "import sys, asr_kd.cli, asr_kd.files; sys.exit(bool({'fsspec', 's3fs', 'botocore'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
