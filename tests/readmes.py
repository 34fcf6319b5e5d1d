"""What READMEs tell a reader to type: blocks of commands, their markers, and whether the program takes them.

A block that holds a command of ours (`asr-kd`, `python`, `pip`, `make`, `torchrun`, `sbatch`) has a comment in front of it:

    <!-- run -->                                   it is run on a tiny set, and what it shows is compared
    <!-- run; instead of A stands B; may differ: X | Y -->   B is run; X and Y may be others (`figures`: every number)
    <!-- not run: why -->                          its words are checked all the same

Where lines begin with `$`, the others are what is printed; a line `…` stands for any lines, and `…` in a line for any words.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from asr_kd import cli
from asr_kd.config.load import override
from asr_kd.config.verbs import VERBS
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.errors import UserError
from asr_kd.evaluation.gate import parse_gate
from asr_kd.recipes import recipes
from asr_kd.typed import landed

ROOT = Path(__file__).parents[1]
PROGRAM = re.compile(r"(^|[|;&] *)(\$ )?([A-Z_]+=\S+ )*(\S*/bin/)?(asr-kd|python[\d.]*|pip|make|torchrun|sbatch)\s")
MARKER = re.compile(r"<!-- (run|not run)\b(.*?) *-->")
#: 1,918, 0.99992, 1e-05
NUMBER = re.compile(r"\d(?:[\d,.]*\d)?(?:e-\d+)?")
OURS = ("pipelines/", "tests/", "asr_kd/", "docker/", "data_manifests/")


def readmes() -> list[Path]:
    """Every README and RESULTS of the project, those for newcomers first."""
    found = [file for name in ("README.md", "RESULTS.md") for file in ROOT.rglob(name)]
    ours = [
        file for file in found if not {".venv", "build", "runs", "node_modules"} & set(file.relative_to(ROOT).parts)
    ]
    return sorted(ours, key=lambda file: (file.parent != ROOT, file))


@dataclass
class Command:
    """A command as it is typed, and the lines that it is said to print; None: nothing is said."""

    text: str
    output: list[str] | None

    @property
    def refused(self) -> bool:
        """Whether a mistake is shown, on purpose."""
        return bool(self.output) and re.match(r"asr-kd \w+: ", self.output[-1]) is not None  # type: ignore[index]


@dataclass
class Block:
    """A fenced block with commands.

    Attributes:
        where: file and line.
        marker: `run`, `not run`, or empty: it has none.
        why: of `not run`.
        instead: what in the commands stands for what in the run.
        differs: what of the output may be other than shown.
    """

    where: str
    commands: list[Command]
    marker: str = ""
    why: str = ""
    instead: dict[str, str] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)


def blocks(file: Path) -> Iterator[Block]:
    """The blocks of a file that hold commands."""
    lines = file.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        if not (fence := re.fullmatch(r"\s*```(\w*)", lines[number])):
            number += 1
            continue
        end = next(later for later in range(number + 1, len(lines)) if lines[later].strip() == "```")
        inside = [line.removeprefix(re.match(r"\s*", lines[number])[0]) for line in lines[number + 1 : end]]
        if fence[1] in ("", "sh", "bash", "console") and any(PROGRAM.search(line) for line in inside):
            where = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
            block = Block(f"{where}:{number + 1}", list(_commands(inside)))
            before = next((line for line in reversed(lines[:number]) if line.strip()), "")
            if marker := MARKER.fullmatch(before.strip()):
                _read_marker(block, marker)
            yield block
        number = end + 1


def _commands(lines: list[str]) -> Iterator[Command]:
    shown = any(line.startswith("$ ") for line in lines)
    command: Command | None = None
    for line in lines:
        if command and command.text.endswith("\\"):
            command.text = command.text[:-1] + line.strip()
        elif line.startswith("$ ") or not shown:
            if command:
                yield command
            command = Command(line.removeprefix("$ "), [] if shown else None)
        elif command and command.output is not None:
            command.output.append(line)
    if command:
        yield command


def _read_marker(block: Block, marker: re.Match[str]) -> None:
    block.marker, rest = marker[1], marker[2]
    if block.marker == "not run":
        block.why = rest.removeprefix(":").strip()
        return
    for option in filter(None, (option.strip() for option in rest.split(";"))):
        if option.startswith("may differ: "):
            block.differs = option.removeprefix("may differ: ").split(" | ")
        elif stands := re.fullmatch("instead of (.+) stands (.+)", option):
            block.instead[stands[1]] = stands[2]
        else:
            raise AssertionError(f"{block.where}: {option}: no option of a marker; see tests/readmes.py")


def inline(file: Path) -> Iterator[str]:
    """Commands within the text, `asr-kd …`."""
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    yield from (found for found in re.findall(r"`([^`]+)`", text) if re.match(r"asr-kd [a-z]+( |$)", found))


def simple(text: str) -> list[list[str]]:
    """The words of each command of a line of shell."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";|&"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def run(text: str) -> tuple[int, str]:
    """Run a command of a block in this process; its exit status, and what it printed (of a mistake on standard error)."""
    printed, said = io.StringIO(), io.StringIO()
    ((program, *words),) = simple(text)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            if program == "asr-kd":
                status = int(cli.main(words))
            elif words[0] == "-c":
                exec(compile(words[1], "README", "exec"), {})
                status = 0
            else:
                status = _run_script(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, printed.getvalue() + (said.getvalue() if status else "")


def _run_script(words: list[str]) -> int:
    before, sys.argv = sys.argv, words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = before
    return 0


def mistakes(text: str, whole: bool = True) -> list[str]:
    """What is wrong with a line of commands; `whole`: nothing that must be there may be left out."""
    return [f"{text}: {wrong}" for words in simple(text) for wrong in _wrong(words, whole)]


def _wrong(words: list[str], whole: bool) -> Iterator[str]:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:] or [""]
    for word in words:
        if word.startswith(OURS) and re.search(r"\.\w+$", word) and not (ROOT / word).exists():
            yield f"{word} is not there"
    program, rest = Path(words[0]).name, words[1:]
    if program == "asr-kd":
        yield from _wrong_verb(rest, whole)
    elif program in ("pip", "make"):
        yield from _wrong_install(program, rest)
    elif program == "torchrun":
        yield from _wrong_verb(rest[rest.index("asr_kd.cli") + 1 :], whole)
    elif program == "sbatch" and "--wrap" in rest:
        yield from mistakes(rest[rest.index("--wrap") + 1], whole)
    elif re.fullmatch(r"python[\d.]*", program):
        yield from _wrong_python(rest, whole)


def _wrong_python(words: list[str], whole: bool) -> Iterator[str]:
    if words[0] == "-c":
        compile(words[1], "README", "exec")
    elif words[:2] == ["-m", "pip"]:
        yield from _wrong_install("pip", words[2:])
    elif words[:2] == ["-m", "asr_kd.cli"]:
        yield from _wrong_verb(words[2:], whole)
    elif words[0] != "-m":
        yield from _wrong_script(ROOT / words[0], words[1:])
    elif words[1].startswith(("tests.", "asr_kd.")):
        file = ROOT / f"{words[1].replace('.', '/')}.py"
        yield from [] if file.exists() else [f"{words[1]} is not there"]
        yield from _wrong_script(file, words[2:])


def _wrong_install(program: str, words: list[str]) -> Iterator[str]:
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        yield from (f"{word}: no target of the Makefile" for word in words if "=" not in word and word not in targets)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"(?:asr-kd|\.)\[([\w,-]+)\]", " ".join(words)):
        yield from (f"{extra}: no extra of pyproject.toml" for extra in name.split(",") if extra not in known)
    for word in words:
        if word.endswith((".lock", ".toml")) and not (ROOT / word).exists():
            yield f"{word} is not there"


class Parsed(Exception):
    """A script has read its arguments, and is not to do more."""


def _wrong_script(file: Path, words: list[str]) -> Iterator[str]:
    if not file.exists() or "argparse" not in file.read_text():
        return
    real = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser: argparse.ArgumentParser, *arguments: object) -> None:
        _, rest = real(parser, *arguments)  # type: ignore[call-overload]
        raise Parsed([word for word in rest if "=" not in word])  # what follows -- are overrides

    before = sys.argv, sys.path[:]
    # recipes and benchmarks have files of the same names, and other tests may have loaded those of another folder
    beside = [path.stem for path in file.parent.glob("*.py")]
    modules = {name: sys.modules.pop(name) for name in beside if name in sys.modules}
    sys.path.insert(0, str(file.parent))
    sys.argv = [str(file), *(word for word in words if "…" not in word)]
    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(str(file), run_name="__main__")
        yield "it has not looked at its arguments"
    except Parsed as parsed:
        yield from (f"{word}: unknown" for word in parsed.args[0] if word != "--")
    except SystemExit:  # a line of argparse; else a package that it needs is not there
        yield from said.getvalue().strip().splitlines()[-1:]
    finally:
        argparse.ArgumentParser.parse_known_args = real  # type: ignore[method-assign]
        sys.argv, sys.path[:] = before
        for name in beside:
            sys.modules.pop(name, None)
        sys.modules.update(modules)


def _wrong_verb(words: list[str], whole: bool) -> Iterator[str]:
    """Of `asr-kd`: the verb, its options, and the keys and values of its settings."""
    if not words or words[0].isupper() or (not whole and words[0] in VERBS and not any("=" in word for word in words)):
        return
    whole = whole and not any("…" in word for word in words)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            parsed, rest = cli._parser().parse_known_args([word for word in words if "…" not in word])
        except SystemExit as end:
            if end.code:
                yield said.getvalue().strip()
            return
    words = [*parsed.words, *(word for word in rest if word != "-")]
    if parsed.verb == "run":
        yield from _wrong_pipeline(words)
        return
    kind = TranscribeSettings if parsed.verb == "transcribe" else VERBS[parsed.verb].kind()
    whole = whole and bool(words) and not any(word.endswith((".yaml", ".yml")) for word in words)
    try:
        if parsed.verb == "eval" and parsed.fail_if:
            parse_gate(parsed.fail_if)
        kind.model_validate(landed(override({}, [word for word in words if "=" in word]), kind))
    except UserError as error:
        yield str(error)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            if whole or one["type"] != "missing":
                yield f"{'.'.join(map(str, one['loc']))}: {one['msg']}"


def _wrong_pipeline(words: list[str]) -> Iterator[str]:
    from asr_kd.pipeline import load_pipeline

    if not words:
        return
    place = recipes().get(words[0], ROOT / words[0])
    try:
        load_pipeline(place / "pipeline.yaml" if place.is_dir() else place, words[1:])
    except UserError as error:
        yield str(error)


def difference(block: Block, command: Command, printed: str) -> str:
    """How what a command printed differs from what its block shows; empty: it does not."""
    if not command.output:
        return ""
    expected = "".join(
        "(?:.*\n)*?" if line.strip() == "…" else f"{_pattern(line, block.differs)}\n" for line in command.output
    )
    if re.fullmatch(expected, printed):
        return ""
    return f"{block.where}: {command.text}\nshows\n" + "\n".join(command.output) + f"\nand printed\n{printed}"


def _pattern(line: str, differs: list[str]) -> str:
    if "figures" in differs:
        return NUMBER.sub(lambda _: NUMBER.pattern, re.escape(NUMBER.sub("0", line))).replace("…", ".*")
    pattern = re.escape(line).replace("…", ".*")
    for what in differs:
        like = NUMBER.sub(lambda _: NUMBER.pattern, re.escape(NUMBER.sub("0", what))) if NUMBER.match(what) else ".*"
        pattern = pattern.replace(re.escape(what), like)
    return pattern
