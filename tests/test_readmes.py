"""Whatever READMEs tell a reader to type is taken by the program, and what they show is what it prints (`readmes.py` says how)."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from asr_kd import cli, pipeline
from asr_kd.config.verbs import VERBS
from asr_kd.shards.tarset import read_index, read_shard, write_index, write_shard
from tests import readmes
from tests.readmes import ROOT, blocks

FILES = readmes.readmes()
NAMES = [str(file.relative_to(ROOT)) for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_every_command_is_marked_and_has_the_words_that_the_program_knows(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = []
    for block in blocks(file):
        if file.name == "README.md" and (not block.marker or (block.marker == "not run" and not block.why)):
            found.append(f"{block.where}: put <!-- run --> or <!-- not run: why --> in front of it; see tests/readmes.py")
        for command in block.commands:
            found += [f"{block.where}: {wrong}" for wrong in readmes.mistakes(command.text)]
    for text in readmes.inline(file):
        found += [f"{file.relative_to(ROOT)}: {wrong}" for wrong in readmes.mistakes(text, whole=False)]
    assert not found, "\n".join(found)
