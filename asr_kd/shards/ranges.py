"""The plan of a job over a manifest: it is read and checked once, and split into ranges that any process can do without it.

The checked utterances lie in the output until the job is done, as JSON lines in files of a few megabytes. So all kinds of manifests
look the same to those who work, none of them reads more than its part, and nothing is checked again when a job goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_kd.ending import stop_if_asked
from asr_kd.errors import UserError
from asr_kd.files import (
    Place,
    clear_errors,
    local_copy,
    names_in,
    parse_json,
    readable,
    sha256_file,
    write_json,
    write_whole,
)
from asr_kd.progress import Progress
from asr_kd.shards.leases import SHARED, WAIT, Leases
from asr_kd.shards.manifest import Utterance, perhaps_text
from asr_kd.shards.manifests import Manifest, Survey, as_line, from_line, open_manifest
from asr_kd.shards.manifests.kinds import Kind

#: of an output: the folder of its plan, and in it the file that comes last and makes it whole
FOLDER, HEAD = ".plan", "plan.json"
#: utterances in a file of the plan, which holds whole ranges: at most so many, or one range
UTTERANCES = 20_000
#: seconds that a file must be old before its size and the time of its last change stand for its content
SETTLED = 2.0


@dataclass(frozen=True)
class Plan:
    """Ranges of utterances, numbered from 0.

    Attributes:
        folder: where it lies.
        base: from which paths count.
        total: utterances of all ranges.
        size: utterances of each but the last.
        together: ranges in a file.
    """

    folder: Place
    base: Place
    total: int
    size: int
    together: int

    @property
    def ranges(self) -> range:
        """Their numbers."""
        return range(-(-self.total // self.size))

    def count(self, number: int) -> int:
        """Utterances of a range."""
        return min(self.size, self.total - number * self.size)

    def read(self, number: int) -> list[Utterance]:
        """The utterances of a range; UserError when not all of them are there."""
        part, turn = divmod(number, self.together)
        path = self.folder / _part(part)
        with ExitStack() as stack:
            stack.enter_context(readable(path, "part of a plan", "run the command again"))
            lines = stack.enter_context(open(stack.enter_context(local_copy(path)), encoding="utf-8"))
            mine = itertools.islice(lines, turn * self.size, (turn + 1) * self.size)
            try:
                found = [from_line(line, self.base) for line in mine]
            except (ValueError, TypeError, AttributeError, KeyError):
                found = []
        if len(found) < self.count(number):
            raise UserError(f"{path}: is damaged; remove {self.folder}, and run the command again")
        return found


@dataclass(frozen=True)
class Source:
    """A manifest as a job finds it.

    Attributes:
        hash: of its content: of JSON lines the SHA-256, of others as `Survey.fingerprint`.
        state: its path, a hash of the sizes and times of the last change of all files that it is read from, by which a change is noticed without
            reading them, and the latest of these times; None in a store.
    """

    path: Place
    hash: str
    state: list[Any] | None

    @classmethod
    def found(cls, path: Place, output: Place) -> Source:
        """Its content is read unless by size and time it is what the plan in `output` was made of."""
        head = _head(output)
        with readable(path, "manifest"):
            manifest = open_manifest(path)
            state = _state(manifest)
            if state and head and head["state"] == state:
                return cls(path, head["claim"]["manifest"], state)
            lines = manifest.kind is Kind.LINES  # checked as they are planned, not twice
            return cls(path, sha256_file(path) if lines else manifest.survey().fingerprint, state)


def make_plan(source: Source, output: Place, claim: dict[str, Any], size: int, check: Callable[[], None]) -> Plan:
    """The plan of a job, made unless it is there; of several processes one makes it, while the others wait.

    Args:
        source: what is planned.
        output: folder of the job, which is made where it is missing; where the manifest is wrong nothing is left there.
        claim: all that the job depends on.
        size: utterances of a range.
        check: raises UserError when `output` belongs to another job.

    Raises:
        UserError: when the manifest is wrong, or changes meanwhile.
    """
    made = not output.exists()
    try:
        _make_folders(output)
        with Leases(output / SHARED) as leases:
            while not (plan := _planned(source, output, claim, size)):
                check()
                if leases.take(HEAD):
                    # another may have finished it, and given back its lease, between the two looks
                    return _planned(source, output, claim, size) or _make(source, output, claim, size)
                time.sleep(WAIT)
                _make_folders(output)  # another has given up, and cleared them away
            return plan
    except UserError:
        if made:
            with contextlib.suppress(OSError):
                output.rmdir()
        raise


def remove_plan(output: Place) -> None:
    """When the job is done."""
    folder = output / FOLDER
    with contextlib.suppress(OSError):
        for name in sorted(names_in(folder), key=lambda name: name != HEAD):  # never a half that counts as whole
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _make_folders(output: Place) -> None:
    for folder in (output, output / FOLDER):
        with clear_errors(folder / "any"):
            folder.mkdir(parents=True, exist_ok=True)


def _head(output: Place) -> dict[str, Any] | None:
    """What the last file of a plan says, if it is there."""
    path = output / FOLDER / HEAD
    try:
        value = parse_json(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return value if isinstance(value, dict) and value.keys() >= {"claim", "state", "total", "together"} else None


def _planned(source: Source, output: Place, claim: dict[str, Any], size: int) -> Plan | None:
    """The plan that is there, if it is of this job."""
    head = _head(output)
    if head is None or head["claim"] != claim:
        return None
    return Plan(output / FOLDER, open_manifest(source.path).base, head["total"], size, head["together"])


def _make(source: Source, output: Place, claim: dict[str, Any], size: int) -> Plan:
    """Read the manifest, check it, and write the plan."""
    remove_plan(output)  # of a process that was killed
    _make_folders(output)
    manifest, together = open_manifest(source.path), max(1, UTTERANCES // size)
    plan = Plan(output / FOLDER, manifest.base, 0, size, together)
    total = unlabelled = 0
    other = None  # what the first line may call its text
    notes: Counter[str] = Counter()
    try:
        with Progress("manifest", None, "utterances") as progress:
            utterances = manifest.read(notes)
            for part in itertools.count():
                first = next(utterances, None)
                if first is None:
                    break
                if part == 0 and manifest.kind in (Kind.LINES, Kind.NEMO):
                    other = perhaps_text(first.fields)
                with write_whole(plan.folder / _part(part), "w", make_folder=False) as file:
                    for utterance in itertools.chain([first], itertools.islice(utterances, together * size - 1)):
                        stop_if_asked()
                        file.write(as_line(utterance, plan.base))
                        total, unlabelled = total + 1, unlabelled + (utterance.text is None)
                progress.advance(total - progress.done)
        survey = Survey(total, unlabelled, source.hash, +notes)
        print(f"{source.path}: read as {manifest.kind.value}, {survey}", file=sys.stderr)
        if unlabelled == total and other and not claim.get("drop_text"):
            print(f"{source.path}: no line has text; the first has {other}: call it text", file=sys.stderr)
        state = _state(manifest)
        if state != source.state:
            raise UserError(f"{source.path}: was changed while it was read; run the command again")
        settled = state if state and time.time_ns() - state[2] > SETTLED * 1e9 else None
        head = {"claim": claim, "state": settled, "total": total, "together": together}
        write_json(plan.folder / HEAD, head, make_folder=False)
    except UserError:
        remove_plan(output)
        raise
    return dataclasses.replace(plan, total=total)


def _part(number: int) -> str:
    """File name of a part of a plan."""
    return f"{number:06d}.jsonl"


def _state(manifest: Manifest) -> list[Any] | None:
    """See `Source`."""
    if not isinstance(manifest.path, Path):
        return None
    digest, newest = hashlib.sha256(), 0
    for path in manifest.files():
        with contextlib.suppress(OSError):  # not there, or a link to nowhere
            found = os.stat(str(path))
            digest.update(
                f"{os.path.abspath(str(path))}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
            newest = max(newest, found.st_mtime_ns)
    return [str(manifest.path.absolute()), digest.hexdigest(), newest]
