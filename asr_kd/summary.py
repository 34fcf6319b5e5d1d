"""What a command says of itself when it ends: one JSON object with the same keys for every verb.

A job tells its figures as it ends; the command line adds how and when it ended, and writes `summary.json` into the job's output folder.
That file is of the run and not of the work: a job that was resumed or shared ends in the same bytes but for it.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from asr_kd.ending import Status
from asr_kd.errors import UserError
from asr_kd.files import place, read_json, write_json
from asr_kd.version import version

#: in the output folder of a job that has ended
SUMMARY = "summary.json"
#: verbs whose folder leaves as it is: the same bytes every time, and nothing of this machine
LEAVES = ("export",)


@dataclass
class Told:
    """What a job tells of its work; None where a verb has no such thing, or it is not known.

    Attributes:
        output: the folder or file that holds the result.
        utterances: that went in.
        done: of them, what came out.
        quarantined: of them, what could not be used.
        audio_hours: of what was done.
        figures: others, of this verb.
    """

    output: str | None = None
    utterances: int | None = None
    done: int | None = None
    quarantined: int | None = None
    audio_hours: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)


#: by the job of this process that told last; a job within another is followed by that one
_told = Told()


def tell_summary(output: Any = None, figures: dict[str, Any] | None = None, **counts: Any) -> None:
    """Tell what a job has done, at its end; outside of a command nobody listens.

    Args:
        output: as of `Told`, or None.
        figures: of this verb alone; valid JSON.
        counts: `utterances`, `done`, `quarantined` and `audio_hours`, as of `Told`.
    """
    global _told
    _told = Told(None if output is None else str(output), figures=figures or {}, **counts)


@dataclass
class Ending:
    """How a command has ended, to be filled in; as it stands, by a defect."""

    status: int = Status.DEFECT
    message: str | None = None


def check_file(file: str) -> None:
    """Refuse a file for the summary that was meant as something else, such as the settings that follow: it would be overwritten.

    Raises:
        UserError: when its name does not end in .json, another file is there, or its store cannot be reached.
    """
    if file == "-":
        return
    if not file.endswith(".json"):
        raise UserError(f"{file!r} is no file for a summary; its name ends in .json, or is - for standard output")
    path = place(file)
    try:
        if not path.is_file():
            return
    except OSError:  # is told where it is written
        return
    try:
        known = read_json(path)
    except UserError:
        known = None
    if not isinstance(known, dict) or not {"verb", "exit"} <= known.keys():
        raise UserError(f"{file} is there and is no summary; choose another name")


@contextmanager
def summarised(verb: str | None, file: str | None = None) -> Iterator[Ending]:
    """Within this context a command runs; its summary is written as it leaves, and a warning where it cannot be.

    Args:
        verb: its name; None where the command names none that there is.
        file: where it is written too, however the command ends; `-` is standard output.
    """
    tell_summary()
    ending, began = Ending(), time.time()
    try:
        yield ending
    finally:
        status = Status(ending.status)
        started = datetime.datetime.fromtimestamp(round(began), datetime.UTC).isoformat()
        value = {
            "verb": verb, "status": status.name.lower(), "exit": int(status), "message": ending.message, "version": version(),
            "started": started, "seconds": round(time.time() - began, 3), **asdict(_told),
        }  # fmt: skip
        value = json.loads(json.dumps(value), parse_constant=lambda _: None)  # JSON has no number that is none
        first = os.environ.get("RANK", "0") == "0"  # of several processes of torchrun
        try:
            # a command that was refused may have named the folder of another job
            if (
                _told.output
                and verb not in LEAVES
                and status in (Status.DONE, Status.DOES_NOT_HOLD)
                and (folder := place(_told.output)).is_dir()
            ):
                write_json(folder / SUMMARY, value, make_folder=False)
            if file == "-" and first:
                print(json.dumps(value, ensure_ascii=False), flush=True)
            elif file and first:
                write_json(file, value)
        except (UserError, OSError) as error:
            print(f"{f'asr-kd {verb}' if verb else 'asr-kd'}: the summary was not written: {error}", file=sys.stderr)
