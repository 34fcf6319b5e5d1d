"""Objects of a store (`s3://`, `gs://`, any URL that fsspec reads) with the methods of a path, every request retried.

Objects are written atomically: a store publishes an object when its last byte has arrived.
"""

from __future__ import annotations

import contextlib
import errno
import posixpath
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from asr_kd.errors import UserError
from asr_kd.temporary import FULL, room_for, temporary

A = TypeVar("A")

#: attempts at a request with transient errors, and seconds before the second one, which double up to MAX_PAUSE
ATTEMPTS, PAUSE, MAX_PAUSE = 10, 0.1, 30.0
#: stores that write atomically and can refuse to replace an object; others (http, sftp, …) are only read
WRITABLE = ("s3", "s3a", "gs", "gcs", "memory")
URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_LOST = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)
_TRANSIENT = (errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.EAGAIN, *_LOST)


class Stat(NamedTuple):
    """Size of an object in bytes."""

    st_size: int


@dataclass(frozen=True)
class ObjectPath:
    """The path of an object, or of a folder of objects (a prefix), with the methods of `pathlib.Path` and a few more.

    Every method raises UserError when the store cannot be reached after several attempts, refuses access, or has no such
    bucket; those that read or remove an object raise FileNotFoundError when it is not there.

    Attributes:
        protocol: what is before `://`.
        path: bucket and key, without slashes at its ends.
    """

    protocol: str
    path: str

    @classmethod
    def parse(cls, url: str) -> ObjectPath:
        """From a URL; UserError when nothing follows its `://`."""
        protocol, path = URL.fullmatch(url).groups()  # type: ignore[union-attr]  # only called for URLs
        if not path.strip("/"):
            raise UserError(f"{url}: names no bucket; write {protocol}://BUCKET/FOLDER")
        return cls(protocol, path.strip("/"))

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path}"

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.protocol, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.protocol, posixpath.dirname(self.path) or self.path)

    def exists(self) -> bool:
        """Whether there is an object here, or anything below."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether there is an object here."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> Stat:
        """The object's size."""
        return Stat(self._request(lambda store: store.info(str(self)))["size"])

    def names(self) -> Iterator[str]:
        """Names of the entries directly below, many a request; none if there are none."""
        if self.protocol not in ("s3", "s3a"):
            with contextlib.suppress(FileNotFoundError):
                entries = self._request(lambda store: store.ls(str(self), detail=False))
                yield from (posixpath.basename(entry.rstrip("/")) for entry in entries)
            return
        # page by page: a full list takes a gigabyte for a million objects
        bucket, _, key = self.path.partition("/")
        wanted: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "Delimiter": "/"}
        while True:
            page = self._request(lambda store: store.call_s3("list_objects_v2", **wanted))
            for entry in [*page.get("Contents", []), *page.get("CommonPrefixes", [])]:
                if name := posixpath.basename(entry.get("Key", entry.get("Prefix")).rstrip("/")):
                    yield name
            if not page.get("IsTruncated"):
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a store has no folders."""

    def rmdir(self) -> None:
        """Nothing: a store has no folders."""

    def read_bytes(self, size: int | None = None, start: int = 0) -> bytes:
        """The object's bytes from `start` on, `size` of them or all."""
        end = None if size is None else start + size
        return self._request(lambda store: store.cat_file(str(self), start=start or None, end=end))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The object as text."""
        return self.read_bytes().decode(encoding, errors)

    @contextlib.contextmanager
    def fetched(self) -> Iterator[Path]:
        """A local copy within the context."""
        with contextlib.ExitStack() as stack:
            with room_for(f"a copy of {self}"):
                _, copy = stack.enter_context(temporary())
                self._request(lambda store: store.get_file(str(self), str(copy)))
            yield copy

    @contextlib.contextmanager
    def written(self, mode: str) -> Iterator[IO[Any]]:
        """A local temporary file that is uploaded when the block ends without an error."""
        self.check_writable()
        with room_for(f"a copy of {self}"), temporary(mode) as (file, path):
            yield file
            file.flush()
            self._request(lambda store: store.put_file(str(path), str(self)))

    def write(self, data: bytes) -> None:
        """Write `data`, replacing any object here."""
        self.check_writable()
        self._request(lambda store: store.pipe_file(str(self), data))

    def create(self, data: bytes) -> bool:
        """Write `data` unless there is an object; returns whether it is `data` now: of several with other data, one succeeds."""
        self.check_writable()
        try:
            self._request(lambda store: store.pipe_file(str(self), data, mode="create"))
            return True
        except FileExistsError:
            # it may be ours: a request whose answer was lost is repeated, here or in the HTTP client
            with contextlib.suppress(FileNotFoundError):
                return self.read_bytes() == data
            return False

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        self.check_writable()
        try:
            self._request(lambda store: store.rm_file(str(self)))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def check_writable(self) -> None:
        """Raise UserError when such a store is only read here."""
        if self.protocol not in WRITABLE:
            raise UserError(f"{self}: {self.protocol}:// is only read here; write to a local folder, s3:// or gs://")

    def _info(self) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError):
            return self._request(lambda store: store.info(str(self)))
        return None

    def _request(self, request: Callable[[Any], A]) -> A:
        """Do `request` with the store, again after transient errors; UserError on all but FileNotFound- and FileExistsError."""
        store = _store(self)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return request(store)
            except Exception as error:
                if _code(error) == "NoSuchBucket":
                    raise UserError(f"{self}: there is no such bucket; make it, or check the URL") from error
                if isinstance(error, FileNotFoundError) and _unanswered(error.__cause__):
                    error = error.__cause__  # type: ignore[assignment]
                elif isinstance(error, FileNotFoundError | FileExistsError):
                    raise
                if not _from_store(error) or getattr(error, "errno", None) in FULL:
                    raise
                if not _transient(error):
                    raise UserError(f"{self}: {_refusal(error)}") from error
                if attempt == ATTEMPTS:
                    raise UserError(
                        f"{self}: the store failed {ATTEMPTS} times, at last with: {_said(error)}; "
                        "see that it can be reached and run the command again"
                    ) from error
            time.sleep(random.uniform(0.5, 1.0) * min(MAX_PAUSE, PAUSE * 2 ** (attempt - 1)))
        raise AssertionError("the last attempt returns or raises")


def _store(path: ObjectPath) -> Any:
    """The file system of fsspec for a URL (kept by fsspec, one a process)."""
    import fsspec

    if path.protocol == "ftp":  # it is of one host
        raise UserError(f"{path}: ftp:// is not read here; fetch the file first: wget {path}")
    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write too
    if path.protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}  # retried only here
    try:
        store = fsspec.filesystem(path.protocol, **options)
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}.get(path.protocol)
        need = (
            f"needs the extra asr-kd[{extra}]; pip install 'asr-kd[{extra}]'" if extra else f"cannot be read ({error})"
        )
        raise UserError(f"{path.protocol}:// {need}") from None
    except ValueError:
        raise UserError(f"{path}: {path.protocol}:// is not known; use a local path, s3:// or gs://") from None
    if path.protocol in ("s3", "s3a"):
        store.retries = 1
    return store


def _unanswered(cause: BaseException | None) -> bool:
    """Whether fsspec takes an object of a web server for missing because the server gave no answer, or another one."""
    lost = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return lost or getattr(cause, "status", 404) not in (404, 410)


def _from_store(error: Exception) -> bool:
    modules = {type(one).__module__.partition(".")[0] for one in (error, error.__cause__)}
    return isinstance(error, OSError) or not modules.isdisjoint(
        ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "http", "requests", "urllib3")
    )


def _answer(error: BaseException) -> dict[str, Any]:
    """S3's answer, if `error` comes from one."""
    answers = (getattr(one, "response", None) for one in (error, error.__cause__))
    return next((answer for answer in answers if isinstance(answer, dict)), {})


def _code(error: Exception) -> str:
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _status(error: Exception) -> int:
    return getattr(error, "status", 0) or _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _transient(error: Exception) -> bool:
    if status := _status(error):
        return status >= 500 or status in (408, 409, 429) or _code(error) in ("RequestTimeout", "IncompleteBody")
    if isinstance(error, PermissionError):
        return False
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in (None, *_TRANSIENT)
    return not isinstance(error, ValueError) and not re.search("Credentials|Validation", type(error).__name__)


def _refusal(error: Exception) -> str:
    if "Credentials" in type(error).__name__ or "credentials" in str(error):
        return "no credentials for this store were found; set them in the environment or in its configuration file"
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return f"access denied ({_said(error)}); check the credentials and what they allow"
    return f"the store refused the request ({_said(error)}); check the URL"


def _said(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
