"""Every help page and the usual mistakes of every verb, word for word, as in `snapshots/`: a file a verb, of commands and of what they print.

Where a change of words is meant, `python tests/test_help.py` writes the answers anew; a command is added by its line `$ asr-kd …`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest

from asr_kd import cli
from asr_kd.config.verbs import VERBS

SNAPSHOTS = Path(__file__).parent / "snapshots"


def answered(text: str) -> str:
    """The commands of a snapshot, each with what it prints now."""
    lines = []
    for command in [line for line in text.splitlines() if line.startswith("$ asr-kd")]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
            cli.main(shlex.split(command)[2:])
        lines += [command, printed.getvalue()]
    return "\n".join(lines)


def evenly(text: str) -> str:
    """The text without how wide its columns are: argparse sets the list of verbs otherwise from Python 3.13 on."""
    return re.sub(r"\s{2,}", "  ", text)


@pytest.mark.parametrize("name", ["asr-kd", *(verb.name for verb in VERBS.values() if verb.help)])
def test_pages_and_messages_are_as_they_were(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.chdir(shutil.copytree(SNAPSHOTS / "files", tmp_path / "files"))
    expected = (SNAPSHOTS / f"{name}.txt").read_text()
    assert evenly(answered(expected)) == evenly(expected)
    assert sorted(os.listdir()) == sorted(os.listdir(SNAPSHOTS / "files")), "a mistake leaves nothing behind"


if __name__ == "__main__":
    os.environ.update(COLUMNS="100", HOME="/home/user")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(shutil.copytree(SNAPSHOTS / "files", Path(folder) / "files"))
        for file in SNAPSHOTS.glob("*.txt"):
            file.write_text(answered(file.read_text()))
