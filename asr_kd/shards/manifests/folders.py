"""Folders of audio files: LibriSpeech's, with `*.trans.txt` beside them, and any others, without text."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator

from asr_kd.errors import UserError
from asr_kd.files import Place
from asr_kd.shards.manifest import text_lines
from asr_kd.shards.manifests.entries import AUDIO, Entry, ending, files_below, stem, words

TRANSCRIPTS = ".trans.txt"


def librispeech(folder: Place, notes: Counter[str]) -> Iterator[Entry]:
    """The lines of all `*.trans.txt` below a folder (an id and its text), with the audio file of that name beside them.

    Audio files without a line follow those of their folder, without text. A line without a file is an entry too, whose
    audio is missing.
    """
    for above, paths in itertools.groupby(files_below(folder), lambda path: path.rpartition("/")[0]):
        here: Place = folder / above if above else folder
        names = [path.rpartition("/")[2] for path in paths]
        audio: dict[str, str] = {}
        for name in names:
            if ending(name) in AUDIO and audio.setdefault(stem(name), name) != name:
                raise UserError(f"{here}: {audio[stem(name)]} and {name} have the same id; remove one of them")
        for name in names:
            if name.endswith(TRANSCRIPTS):
                for _, where, line in text_lines(here / name, "list of transcripts"):
                    key, *text = words(line, 1)
                    file = here / (audio.pop(key, "") or f"{key}.flac")
                    yield Entry(where, key, file, "".join(text), _speaker(key), identity=key)
            elif ending(name) not in AUDIO:
                notes[f".{ending(name) or name} files not read"] += 1
        for key, name in audio.items():
            yield Entry(str(here / name), key, here / name, None, _speaker(key), identity=key)


def _speaker(key: str) -> dict[str, str]:
    """Speaker and chapter of an id such as 19-198-0000."""
    found = re.fullmatch(r"(\d+)-(\d+)-\d+", key)
    return {"speaker": found[1], "chapter": found[2]} if found else {}


def audio_alone(folder: Place, notes: Counter[str]) -> Iterator[Entry]:
    """Every audio file below a folder, by the ending of its name, without text."""
    for path in files_below(folder):
        if ending(path) in AUDIO:
            yield Entry(str(folder / path), stem(path), folder / path)
        else:
            notes[f".{ending(path) or path} files not read"] += 1
