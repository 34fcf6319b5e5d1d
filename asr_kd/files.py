"""Writing files atomically, on a disk or in an object store, and identifying them: write aside, rename, hash, claim."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from asr_kd.errors import UserError
from asr_kd.objects import URL, ObjectPath
from asr_kd.temporary import FULL

#: path of a file or folder, on a local disk or in an object store
Place = Path | ObjectPath
#: start of a URL: a scheme, a colon and slashes, or only some of them, perhaps after a quote
NEARLY_URL = re.compile(r"""([\s'"<]*)([a-z][a-z0-9+.-]*)(:?)(/*)(.*)""", re.IGNORECASE | re.DOTALL)
QUOTES = " '\">"
SCHEMES = ("s3", "s3a", "gs", "gcs", "http", "https", "file")
#: file of an output folder that records which job and settings it belongs to
CLAIM = "job.json"


def place(text: Place | str) -> Place:
    """The path that a setting names: local, or a URL of an object store; UserError where it is misspelt (`spelled`)."""
    if not isinstance(text, str):
        return text
    text = spelled(text)
    return ObjectPath.parse(text) if URL.fullmatch(text) else Path(text)


def spelled(text: str) -> str:
    """The normal spelling of a file or folder: `~` in front is the home folder, `S3://` is `s3://`, `file:///x` is `/x`.

    A local name that looks like a URL needs `./` in front. UserError when it is empty or a misspelt URL.
    """
    if not text.strip():
        raise UserError(f"{text!r}: is empty where a file or folder belongs; a variable of the shell may be empty")
    if text[0] in "/.":
        return text
    if text[0] == "~":
        try:
            return str(Path(text).expanduser())
        except RuntimeError:
            raise UserError(f"{text}: there is no such user; write ./{text} for a name that begins with ~") from None
    found = NEARLY_URL.fullmatch(text)
    before, scheme, colon, slashes, rest = found.groups() if found else ("", "", "", "", "")
    scheme = scheme.lower()
    if not (colon and slashes) and not (scheme in SCHEMES and (colon or len(slashes) > 1)):
        if "://" in text:
            raise UserError(f"{text}: is no URL that is known; use a local path, s3://… or gs://…")
        return text
    if scheme == "file":
        host, slash, rest = rest.partition("/") if len(slashes) == 2 else ("", slashes, rest)
        if before or not colon or not slash or host not in ("", "localhost"):
            raise UserError(f"{text}: is no URL of a file on this machine; write file:///FOLDER/FILE, or its path")
        return "/" + unquote(rest)
    if before or not colon or len(slashes) < 2:
        right = f"{scheme}://{rest.rstrip(QUOTES)}" if scheme in SCHEMES else "s3://… or gs://… for a store"
        raise UserError(f"{text}: is not quite a URL; write {right}, or ./{text} for a local name")
    return f"{scheme}:{slashes}{rest}"


def local(text: str, key: str) -> Path:
    """As `place`, for a setting `key` that must be a local path; UserError where it is a URL."""
    path = place(text)
    if isinstance(path, ObjectPath):
        raise UserError(f"{key}: {text}: must be on a local disk; write there, and copy it to the store afterwards")
    return path


def local_copy(path: Place) -> AbstractContextManager[Path]:
    """The file itself if it is local; a temporary copy of an object within the context; FileNotFoundError without one."""
    return path.fetched() if isinstance(path, ObjectPath) else nullcontext(path)


def names_in(folder: Place) -> Iterator[str]:
    """Names of the entries of a folder, in any order, with few requests to a store; none if it does not exist."""
    if isinstance(folder, ObjectPath):
        yield from folder.names()
    elif folder.exists():
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)


@contextmanager
def write_whole(path: Place | str, mode: str = "wb", make_folder: bool = True) -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing and rename it to `path` once the block has ended without an error.

    A process killed at any moment leaves either the complete new file or the old one. For an object store the file is
    written to the local temporary folder and then uploaded. A job that has claimed its folder must not make it
    (`make_folder`): if it is gone, so is the earlier output, without which the job cannot be resumed.

    Raises:
        UserError: when there is no space left or the folder cannot be written or is gone.
    """
    path = place(path)
    if isinstance(path, ObjectPath):
        with path.written(mode) as file:
            yield file
        return
    aside = None
    try:
        with clear_errors(path):
            if make_folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # a sign of life for `clear_torn`
                os.fchmod(file.fileno(), 0o644)
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(aside, path)
            aside = None
    except FileNotFoundError:
        check_there(path.parent)
        raise
    finally:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)


def clear_torn(folder: Place, began: float) -> None:
    """Remove incomplete files that killed processes left in a folder before the time `began`.

    Files that a process is still writing stay, on whatever machine; an object store has no incomplete files.
    """
    for path in folder.glob(".*.tmp") if isinstance(folder, Path) else ():
        with contextlib.suppress(OSError), open(path, "rb+") as file:  # gone meanwhile, or locked by its writer
            if path.stat().st_mtime < began:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def clear_errors(path: Place) -> Iterator[None]:
    """Turn errors in writing `path` that the user can fix into UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL or (error.errno is None and " written" in str(error)):  # NumPy gives no errno
            raise UserError(f"{path}: no space left on the device; free some and run the command again") from error
        folder = path.parent
        unmade = isinstance(folder, Path) and error.filename in map(str, (folder, *folder.parents))
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            where = folder if unmade else path  # a file in a folder that cannot be made was named by nobody
            raise UserError(
                f"{where}: cannot be written ({error.strerror}); choose a folder you may write to"
            ) from error
        if error.errno == errno.ENOENT and unmade and Path(error.filename).parent.exists():  # as in /proc
            raise UserError(f"{folder}: the folder cannot be made there; choose another output folder") from error
        if error.errno == errno.EEXIST and isinstance(folder, Path) and folder.is_symlink() and not folder.exists():
            raise UserError(f"{folder}: is a link to a folder that is not there; make that, or remove the link") from error  # fmt: skip
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path.parent}: is a file, not a folder; choose another output folder") from error
        if error.errno == errno.EISDIR:
            raise UserError(f"{path}: is a folder where a file belongs; remove it") from error
        if error.errno == errno.EFBIG:
            raise UserError(f"{path}: larger than a file may be here; see `ulimit -f` and the file system") from error
        if error.filename is None:
            error.filename = str(path)  # of a write or a flush: those do not know their file
        raise


def check_there(folder: Place) -> None:
    """Raise UserError when the folder that a job has claimed does not exist any more; an object store has no folders."""
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(f"{folder}: is gone, removed or unmounted since the job began; run the command again")


def create(path: Place | str, text: str) -> bool:
    """Create a file atomically, unless there is one of this name: if several processes try, one succeeds.

    It returns whether it was created (in a store, whether it has this content), and raises FileNotFoundError when its
    folder does not exist, UserError when there is no space left or the folder cannot be written.
    """
    path = place(path)
    if isinstance(path, ObjectPath):
        return path.create(text.encode())
    # written aside and linked, it has its content from the start; and a link never replaces a file
    aside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with clear_errors(path):
            with open(aside, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
                return True
    finally:
        aside.unlink(missing_ok=True)
    return False


def write_json(path: Place | str, value: Any, make_folder: bool = True) -> None:
    """Write `value` as indented JSON, atomically, as `write_whole`."""
    with write_whole(path, "w", make_folder) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Place | str, what: str = "JSON file") -> Any:
    """Read JSON; UserError when the file is missing, unreadable or not JSON; `what` names its role."""
    return parse_json(read_text(path, what), f"{path}")


def read_text(path: Place | str, what: str = "file") -> str:
    """Read UTF-8 text; UserError when the file is missing, a folder, unreadable or not UTF-8; `what` names its role."""
    with readable(path, what):
        return place(path).read_text(encoding="utf-8")


@contextmanager
def readable(path: Place | str, what: str, remedy: str = "check the path") -> Iterator[None]:
    """Turn errors in reading `path` into UserError; `what` names its role, `remedy` says what to do when it is missing."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}; {remedy}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder where a {what} was expected") from None
    except NotADirectoryError:
        raise UserError(f"{path}: no such {what}; a part of the path is a file") from None
    except PermissionError:
        raise UserError(f"{path}: this {what} may not be read; check its permissions") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: this {what} is not UTF-8 text; convert it, or unpack it where it is packed") from None


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; UserError, which `where` begins, when `text` is not JSON or an object in it holds a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); fix or remove it") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply; fix or remove it") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!a} stands twice")
    return value


def sha256_file(path: Place | str) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with local_copy(place(path)) as copy, open(copy, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_state(folder: Path, below: bool = True) -> str:
    """A hash of the names, sizes and times of change of all files in a folder, and in those below it; links to folders are not followed."""
    digest = hashlib.sha256()
    for above, folders, names in os.walk(folder):
        folders[:] = sorted(folders) if below else []
        for path in (Path(above, name) for name in sorted(names)):
            with contextlib.suppress(OSError):  # a link to nowhere
                found = path.stat()
                line = f"{path.relative_to(folder)}\0{found.st_size}\0{found.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """A short stable hash (16 hexadecimal digits) of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def claim_folder(
    folder: Place | str,
    job: str,
    settings: dict[str, Any],
    product: str | None = None,
    named: dict[str, str] | None = None,
    take: bool = True,
) -> None:
    """Mark `folder` as the output of this job with these settings, or refuse it if it belongs to others.

    The claim is `job.json` in the folder. The same claim again is accepted: that is how a job resumes.

    Args:
        job: verb.
        settings: everything that the output depends on; valid JSON.
        product: extension of the job's output files; if there are none yet, the message says so.
        named: hash → the file or folder with that content, to name it in messages.
        take: whether a folder that is free is marked; else it is only looked at.

    Raises:
        UserError: when the folder holds another job's output, other settings' output, or foreign files.
    """
    folder = place(folder)
    claim = folder / CLAIM
    mine = {"job": job, "settings": json.loads(json.dumps(settings))}
    if not claim.exists():
        filled = folder.is_dir() and any(not name.startswith(".") for name in names_in(folder))
        if filled and not claim.exists():  # checked again: another process of this job may have been faster
            raise UserError(f"{folder}: is not empty and was not written by `asr-kd {job}`; choose another folder")
        if not take:
            return
        with clear_errors(claim):
            folder.mkdir(parents=True, exist_ok=True)
            if create(claim, json.dumps(mine, indent=2, ensure_ascii=False) + "\n"):
                return
    theirs = read_json(claim, "job claim")
    if theirs == mine:
        return
    if not isinstance(theirs, dict) or theirs.get("job") != job or not isinstance(theirs.get("settings"), dict):
        raise UserError(f"{folder}: holds the output of another job; choose another output folder")
    differing = _first_difference(theirs["settings"], mine["settings"], named or {})
    remedy = "choose another output folder or remove it"
    # not taken over here: a process with the old settings may be working on its first file
    if product and not any(name.endswith(product) for name in names_in(folder)):
        remedy = f"nothing was finished there yet: unless a job is at work there, remove {claim} to go on with the new settings"
    raise UserError(f"{folder}: belongs to other settings ({differing}); {remedy}")


def claimed_settings(folder: Place | str) -> dict[str, Any]:
    """The settings that a folder is claimed for, empty without a claim; UserError when the claim is not JSON."""
    claim = place(folder) / CLAIM
    match read_json(claim, "job claim") if claim.exists() else None:
        case {"settings": dict(settings)}:
            return settings
    return {}


def _first_difference(old: Any, new: Any, named: dict[str, str], prefix: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), named, f"{prefix}.{key}" if prefix else key)
    name = named.get(new) if isinstance(new, str) else None
    if name and old:  # which file the old hash was of is not known
        return f"{prefix}: {name} does not hold what this output was made from"
    return f"{prefix} was {json.dumps(old)}, now {f'the content of {name}' if name else json.dumps(new)}"
