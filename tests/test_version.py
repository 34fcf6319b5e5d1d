from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import asr_kd
from asr_kd import cli
from asr_kd.version import version

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
STATED = PROJECT["project"]["version"]


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert asr_kd.__version__ == version() == STATED
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"asr-kd {STATED}\n")


def test_source_that_is_not_installed_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert version() == "unknown"


def test_importing_the_package_imports_nothing_large() -> None:
    """So a notebook, or a program that asks for the version, starts at once."""
    code = "import sys, asr_kd; dir(asr_kd); asr_kd.__version__; asr_kd.UserError; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_package_says_that_it_is_typed() -> None:
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["asr_kd"]
    assert (Path(asr_kd.__file__).parent / "py.typed").is_file()
