from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent / "asr_kd"
#: rooms from the lowest up: each imports from those before its own line alone
ORDER = """
errors version
recipes ending typed temporary
objects
files
progress allocator config summary loggers
text audio
units
shards
targets models
decoding
distillation
labeling training evaluation selection export
pipeline plan doctor
cli api
__main__ __init__
"""
LEVELS = {room: level for level, line in enumerate(ORDER.split("\n")) for room in line.split()}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports from, at its head or within, without `asr_kd.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "asr_kd":
            yield from (alias.name for alias in node.names)
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.removeprefix("asr_kd.") for name in names if name.startswith("asr_kd."))


def test_imports_run_one_way() -> None:
    rooms = {path.relative_to(ROOT).with_suffix("").parts[0] for path in ROOT.rglob("*.py")}
    assert rooms == LEVELS.keys(), "a new room needs its place in ORDER"
    wrong = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in ROOT.rglob("*.py")
        for room in (module.split(".")[0] for module in imported(path))
        if (own := path.relative_to(ROOT).with_suffix("").parts[0]) != room and LEVELS[room] >= LEVELS[own]
    ]
    assert not wrong


def test_settings_import_settings_alone() -> None:
    """So a verb's settings, and what is said of mistakes in them, load without torch."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in ROOT.rglob("*settings.py")
        for module in imported(path)
        if not module.startswith("config.") and not module.endswith("settings")
    ]
    assert not wrong


def test_no_file_outgrows_one_idea_and_no_room_the_house() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > 500}
    rooms: Counter[str] = Counter()
    for path, count in lines.items():
        rooms[path.relative_to(ROOT).parts[0]] += count
    assert not {room: count for room, count in rooms.items() if count > 0.2 * sum(lines.values())}


def test_the_command_line_loads_no_torch() -> None:
    """So `--help` and the answer to a mistake come at once."""
    code = "import sys, asr_kd.cli; print(sorted({'torch', 'torchaudio', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def undescribed(node: ast.AST, name: str) -> Iterator[str]:
    """Public functions and classes below a node that take four arguments or more and do not say what they are."""
    for one in ast.iter_child_nodes(node):
        if not isinstance(one, ast.FunctionDef | ast.ClassDef) or (one.name[0] == "_" and one.name != "__init__"):
            continue
        if isinstance(one, ast.FunctionDef):
            owner = node if one.name == "__init__" else one
            taken = {argument.arg for argument in one.args.args + one.args.kwonlyargs} - {"self", "cls"}
            said = ast.get_docstring(owner) or ""  # type: ignore[arg-type]
            if len(taken) >= 4 and "Args:" not in said and not said.startswith("See `"):
                yield f"{name}.{one.name}"
        else:
            yield from undescribed(one, f"{name}.{one.name}")


def test_many_arguments_are_described() -> None:
    assert not [one for path in ROOT.rglob("*.py") for one in undescribed(ast.parse(path.read_text()), path.stem)]
