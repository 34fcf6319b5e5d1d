"""The images, as far as they can be checked without building them: what they take from the repository, and what the one for work leaves out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = re.sub(r"\\\n", "", (ROOT / "docker" / "Dockerfile").read_text())


def stages() -> dict[str, list[list[str]]]:
    """Name of a stage → words of its instructions, those of the stage that it begins as in front."""
    found: dict[str, list[list[str]]] = {}
    for line in TEXT.splitlines():
        words = line.split()
        if words[:1] == ["FROM"]:
            name = words[3]
            found[name] = list(found.get(words[1], []))
        elif words and not words[0].startswith("#"):
            found[name].append(words)
    return found


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {
        line.removeprefix("!") for line in (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }  # fmt: skip
    everything = [words for stage in stages().values() for words in stage]
    copied = {word for words in everything if words[0] == "COPY" for word in words[1:-1]}
    assert copied == kept and all((ROOT / name).exists() for name in copied)


def test_the_image_for_work_is_the_default_without_tools_of_developers_and_without_root() -> None:
    name, work = list(stages().items())[-1]
    assert name == "work"
    users = [words[1] for words in work if words[0] == "USER"]
    assert users and users[-1].isdigit() and int(users[-1]) > 0, (
        "by number, or Kubernetes cannot see that it is not root"
    )
    installs = " ".join(" ".join(words) for words in work if words[0] == "RUN")
    assert "-r requirements-dev.lock" not in installs and "-c requirements-dev.lock" in installs
    assert "git" not in installs and "tests" not in {word for words in work for word in words}


def test_the_image_for_development_has_them() -> None:
    installs = " ".join(" ".join(words) for words in stages()["developer"] if words[0] == "RUN")
    assert "-r requirements-dev.lock" in installs and "-e ." in installs
