"""What a huge manifest costs a prepare job before its first shard: python tests/benchmarks/manifest_scale.py [--lines 10000 …] [--json]

Manifests of so many lines are generated, with a key in each line and without. A fresh process plans each (reads, checks, and splits it), and another one
goes on: it finds the plan and reads its first range. Times are of the processor; memory is what each process grew by, at its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tables import print_rows

LINES = (10_000, 100_000, 1_000_000)


def write_manifest(path: Path, lines: int, keys: bool) -> None:
    """Lines of audio that is nowhere; it was written a while ago."""
    with open(path, "w") as file:
        for number in range(lines):
            line = {
                "audio": f"part{number % 997:03d}/utterance{number:09d}.flac",
                "text": "what was said, more or less",
            }
            # in no order, as keys that are hashes are
            file.write(
                json.dumps(line | ({"key": f"{number * 2654435761 % 2**32:010d}-{number}"} if keys else {})) + "\n"
            )
    os.utime(path, (1e9, 1e9))


def start(folder: Path) -> None:
    """Do what comes before the first shard, and print what it took."""
    from asr_kd.shards.ranges import Source, make_plan

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    source = Source.found(folder / "list.jsonl", folder / "out")
    make_plan(source, folder / "out", {"manifest": source.hash}, 500, lambda: None).read(0)
    seconds = time.process_time() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"cpu_seconds": round(seconds, 2), "megabytes": round(grown / 1024)}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=int, nargs="+", default=LINES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(arguments.start)
        return
    rows = []
    for lines in arguments.lines:
        for keys in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                write_manifest(Path(folder) / "list.jsonl", lines, keys)
                for name in ("plans", "goes on"):
                    took = subprocess.run(
                        [sys.executable, __file__, "--start", folder], stdout=subprocess.PIPE, text=True, check=True
                    )
                    rows.append(
                        {
                            "lines": lines,
                            "keys": "given" if keys else "made",
                            "process": name,
                            **json.loads(took.stdout),
                        }
                    )
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
