"""What the index of a huge set costs a label job before its first shard: python tests/benchmarks/index_scale.py [--json]

An index of so many shards is generated; a fresh process reads it and does what a label job does before it opens a shard:
hash it, look what is done already, and find the first shard to do. Memory is what the process grew by, at its peak.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tables import print_rows

SHARDS = (1_000, 100_000, 1_000_000)


def write_index(folder: Path, shards: int) -> None:
    """An index of shards that are nowhere."""
    with open(folder / "index.json", "w") as file:
        file.write('{"format": "asr_kd-shards", "version": 1, "shards": [')
        for number in range(shards):
            info = {
                "name": f"shard-{number:07d}.tar", "samples": 500, "seconds": 3600.0 + number % 7, "bytes": 115_200_000,
                "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
            }  # fmt: skip
            file.write((", " if number else "") + json.dumps(info))
        file.write("]}")


def start(folder: str) -> None:
    """Do what comes before the first shard, and print what it took."""
    from asr_kd.labeling.job import missing
    from asr_kd.shards.tarset import read_index

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    infos = read_index(folder)
    _ = infos.samples, infos.hash
    next(iter(missing(infos, Path(folder))))
    seconds = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": round(seconds, 2), "megabytes": round(grown / 1024)}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(arguments.start)
        return
    rows = []
    for shards in SHARDS:
        with tempfile.TemporaryDirectory() as folder:
            write_index(Path(folder), shards)
            took = subprocess.run(
                [sys.executable, __file__, "--start", folder], stdout=subprocess.PIPE, text=True, check=True
            )
        rows.append({"shards": shards, **json.loads(took.stdout)})
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
