"""What a look at the keys of joined sets costs: python tests/benchmarks/keys.py [--utterances 10000 …] [--kilobytes 100] [--json]

Two sets hold half of the utterances each, 1,000 in a shard, of so many bytes each (sparse files: what is between the headers is not there). A fresh process
reads the transcripts of all of them; another one looks whether two utterances have the same key. Times are of the processor, for an utterance; memory is
what each process grew by, at its peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tables import print_rows

UTTERANCES = (10_000, 100_000)
SHARD = 1000


def key_of(number: int) -> str:
    """In no order, as keys that are hashes are."""
    return f"{number * 2654435761 % 2**32:010d}-{number}"


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def write_set(folder: Path, first: int, utterances: int, size: int) -> None:
    """Shards of `utterances`, numbered from `first`, whose audio is nothing."""
    from asr_kd.shards.tarset import ShardInfo, write_index

    folder.mkdir()
    infos = []
    fields = b'{"seconds": 10.0}'
    for number in range(0, utterances, SHARD):
        path = folder / f"shard-{number // SHARD:06d}.tar"
        with open(path, "wb") as file:
            for one in range(first + number, first + number + SHARD):
                for ending, length, data in (("flac", size, b""), ("json", len(fields), fields)):
                    file.write(header(f"{key_of(one)}.{ending}", length) + data)
                    file.seek(-(-(file.tell() - len(data) + length) // 512) * 512)
            file.truncate(file.tell() + 10240 - file.tell() % 10240 + 10240)
            infos.append(ShardInfo(path.name, SHARD, 10.0 * SHARD, file.seek(0, 2), f"{first + number:064x}"))
    write_index(folder, infos)


def look(what: str, folder: Path) -> None:
    """Do one of the two, and print what it took."""
    from asr_kd.shards.keys import shared_key
    from asr_kd.shards.manifest import Transcripts
    from asr_kd.shards.tarset import read_index

    audio = [str(folder / "a"), str(folder / "b")]
    shards = read_index(audio)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    if what == "transcripts":
        Transcripts(folder / "texts.jsonl")
    elif shared_key(audio, shards):
        raise SystemExit("two utterances have the same key")
    spent = time.process_time() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    microseconds = round(1e6 * spent / shards.samples, 1)
    print(json.dumps({"cpu_microseconds_each": microseconds, "megabytes": round(grown / 1024)}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--utterances", type=int, nargs="+", default=UTTERANCES)
    parser.add_argument("--kilobytes", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--look", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.look:
        look(arguments.look[0], Path(arguments.look[1]))
        return
    rows = []
    for utterances in arguments.utterances:
        with tempfile.TemporaryDirectory() as folder:
            half = utterances // 2
            for name, first in (("a", 0), ("b", half)):
                write_set(Path(folder) / name, first, half, 1000 * arguments.kilobytes)
            with open(Path(folder) / "texts.jsonl", "w") as file:
                file.writelines(
                    json.dumps({"key": key_of(number), "text": "what was said, more or less"}) + "\n"
                    for number in range(utterances)
                )
            for what in ("transcripts", "keys"):
                command = [sys.executable, __file__, "--look", what, folder]
                took = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append({"utterances": utterances, "read": what, **json.loads(took.stdout)})
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
