"""What `make lock` writes: the packages of a user, and what a developer has on top of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USER, DEVELOPER = "requirements.lock", "requirements-dev.lock"
LINE = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.+!]*( ; [a-z_]+ .+)?")


def locked(name: str) -> dict[str, Requirement]:
    return {canonicalize_name(one.name): one for one in map(Requirement, (ROOT / name).read_text().splitlines())}


def direct(extra: str = "") -> list[Requirement]:
    """The dependencies that pyproject.toml names; an extra of ours stands for what is in it."""
    found = map(Requirement, PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"])
    return [
        one
        for named in found
        for one in (
            [part for name in named.extras for part in direct(name)] if named.name == PROJECT["name"] else [named]
        )
    ]


@pytest.mark.parametrize("name", [USER, DEVELOPER])
def test_every_package_is_pinned_and_no_host_is_named(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert lines and [line for line in lines if not LINE.fullmatch(line) or "://" in line] == []


def test_a_package_stands_in_one_lock_once() -> None:
    names = [line.partition("==")[0] for name in (USER, DEVELOPER) for line in (ROOT / name).read_text().splitlines()]
    assert sorted(names) == sorted(set(names))


def test_direct_dependencies_are_in_their_lock() -> None:
    user, developer = locked(USER), locked(DEVELOPER)
    for wanted, lock in [(one, user) for one in direct()] + [(one, user | developer) for one in direct("dev")]:
        pin = lock[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(str(pin.specifier).removeprefix("==")), f"{wanted} is not met by {pin}"
    assert not {"moto", "mypy", "pytest", "ray", "ruff", "s3fs"} & set(user)


@pytest.mark.parametrize("version", ["3.11.0", "3.12.0", "3.13.0"])
def test_what_is_for_some_machines_alone_is_marked(version: str) -> None:
    of_python = {"python_version": version[:4], "python_full_version": version}
    apple = {**of_python, "sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}
    linux = {**of_python, "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}

    def taken(machine: dict[str, str]) -> set[str]:
        both = {**locked(USER), **locked(DEVELOPER)}
        return {name for name, one in both.items() if one.marker is None or one.marker.evaluate(machine)}

    assert not [name for name in taken(apple) if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert {"torch", "torchaudio"} <= taken(apple) and {"torch", "triton", "nvidia-cublas"} <= taken(linux)
    assert ("flashlight-text" in taken(linux)) == (version < "3.13")
