"""What NIST sclite and sc_stats say of thousands of generated transcripts, kept in nist.json.xz.

Run with SCTK 2.4.10 installed (Debian package `sctk`) to make that file again: `python tests/evaluation/nist.py`.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_name("nist.json.xz")
SET = 100  # transcripts behind one significance test
UNICODE = ["été", "straße", "ÅNGSTRÖM", "слово", "語", "汉字", "हिन्दी", "שלום"]
UNICODE += ["e\u0301te\u0301", "🙂", "ſ", "İ", "don't", "A", "a"]

Triple = tuple[str, str, str]  # reference and the hypotheses of two systems


def triples() -> list[Triple]:
    """3,000 ordinary and awkward transcripts; the same on every machine."""
    rng = random.Random(1)
    made = list(_awkward(rng))
    while len(made) < 3000:
        vocabulary = [f"w{index}" for index in range(rng.choice([2, 3, 10, 100, 1000]))]
        if rng.random() < 0.2:
            vocabulary = UNICODE
        words = rng.choices(vocabulary, k=rng.choice([0, 1, 2, 5, 10, 20, 40]))
        rates = [rng.choice([0.0, 0.05, 0.2, 0.5, 1.0]) for _ in range(2)]
        made.append((" ".join(words), *(_recognised(rng, words, vocabulary, rate) for rate in rates)))
    return made


def _awkward(rng: random.Random) -> Iterator[Triple]:
    yield "", "", ""
    yield "", "a", ""
    yield "", "", "a b a"
    yield "a", "", "A"
    for _ in range(200):  # repetitions
        phrase = rng.choices("abc", k=rng.randint(1, 3))
        yield tuple(" ".join(phrase * rng.randint(0, 6) + rng.choices("abc", k=rng.randint(0, 2))) for _ in range(3))
    for _ in range(200):  # nothing in common but by chance
        yield tuple(" ".join(rng.choices("abcdefghij", k=rng.randint(0, 15))) for _ in range(3))
    vocabulary = [f"w{index}" for index in range(300)]
    for length in (1000, 1500):
        words = rng.choices(vocabulary, k=length)
        yield " ".join(words), _recognised(rng, words, vocabulary, 0.2), _recognised(rng, words, vocabulary, 0.9)
        yield " ".join(words), "", " ".join(words)


def _recognised(rng: random.Random, words: list[str], vocabulary: list[str], rate: float) -> str:
    """The words with errors: one in two is a substitution, the others deletions and insertions."""
    heard: list[str] = []
    for word in words:
        kind = rng.choice("ssdi") if rng.random() < rate else "c"
        heard += {"c": [word], "s": [rng.choice(vocabulary)], "d": [], "i": [word, rng.choice(vocabulary)]}[kind]
    return " ".join(heard)


def find(program: str) -> str | None:
    """A program of SCTK; Debian keeps them off the PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/lib/sctk/bin")


def sclite(transcripts: list[Triple]) -> tuple[str, list[list[str]]]:
    """sclite's output (SGML), and for each transcript its alignments with both hypotheses, a letter C, S, D or I a step."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("reference", "one", "two")]
        for path, texts in zip(paths, zip(*transcripts, strict=True), strict=True):
            path.write_text("".join(f"{text} (s{i % 7}_{i})\n" for i, text in enumerate(texts)), encoding="utf-8")
        command = f"{find('sclite')} -s -e utf-8 -i spu_id -f 0 -o sgml stdout -r {paths[0]} trn"
        command += f" -h {paths[1]} trn one -h {paths[2]} trn two"
        sgml = subprocess.run(command.split(), check=True, capture_output=True, encoding="utf-8").stdout
    found: list[list[str]] = [["", ""] for _ in transcripts]
    for system, text in enumerate(sgml.split("</SYSTEM>")[:2]):
        for index, steps in re.findall(r'<PATH id="\(s\d_(\d+)\)"[^>]*>\n(.*?)\n?</PATH>', text, re.DOTALL):
            found[int(index)][system] = "".join(step[0] for step in steps.split(":") if step)
    return sgml, found


def sc_stats(sgml: str) -> list[float]:
    """Segments, mean difference (3 digits), z (3 digits) and p (3 digits) of the matched pairs test of systems one and two."""
    with tempfile.TemporaryDirectory() as folder:
        for options in ("-v", "-u"):
            subprocess.run(
                [str(find("sc_stats")), "-p", "-t", "mapsswe", options, "-n", "out"],
                input=sgml, encoding="utf-8", check=True, capture_output=True, cwd=folder,
            )  # fmt: skip
        text, unified = ((Path(folder) / f"out.stats.{end}").read_text("utf-8") for end in ("mapsswe", "unified"))
    number = r"(-?[\d.]+|-?nan)"
    line = re.search(rf"# segs: (\d+)\).*\(mean: +{number}\).*\(Z Stat: +{number}\)", text)
    p = re.search(r"MP +\|\| +one +\|[^|]*\| *\S+ +(<?) *([\d.]+)", unified)
    assert line and p, text + unified
    return [int(line[1]), float(line[2]), float(line[3]), 0.0 if p[1] else float(p[2])]


def main() -> None:
    """Write nist.json.xz."""
    transcripts = triples()
    tests = []
    for start in range(0, len(transcripts), SET):
        some = transcripts[start : start + SET]
        tests.append([sc_stats(sclite([(a, *pair) for a, *pair in some])[0])])
        tests[-1].append(sc_stats(sclite([(a, c, b) for a, b, c in some])[0]))
    found = {"alignments": sclite(transcripts)[1], "mapsswe": tests}
    FILE.write_bytes(lzma.compress(json.dumps(found).encode(), preset=9))


if __name__ == "__main__":
    main()
