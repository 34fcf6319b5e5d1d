"""Recipes that come with the package: the same folders lie within it where it was installed from a wheel, and beside it in a clone."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from asr_kd.errors import UserError

#: where setup.py puts what a clone has at its top
SHIPPED = Path(__file__).parent / "shipped"
#: holds `pipelines` and `data_manifests`
HOME = SHIPPED if SHIPPED.is_dir() else Path(__file__).parents[1]
FOLDERS = ("pipelines/", "data_manifests/")


def recipes() -> dict[str, Path]:
    """Name → pipeline file, sorted by name: a recipe's folder, such as `digits`, or a further pipeline of it, `pretrained/text.yaml`."""
    files = (HOME / "pipelines").glob("*/*.yaml")
    found = {
        file.parent.name + f"/{file.name}".removesuffix("/pipeline.yaml"): file for file in files if _is_recipe(file)
    }
    return dict(sorted(found.items()))


def named(name: str) -> Path:
    """The pipeline file of a recipe by its name; a UserError with all names where there is none."""
    found = recipes()
    if name not in found:
        names = ", ".join(found) or "none"
        raise UserError(f"{name}: neither a file or folder here nor a recipe that comes with asr-kd; those are {names}")
    return found[name]


def copied(name: str) -> Path:
    """Copy a recipe's folder to where it lies in a clone, below the working folder, whole or not at all.

    Raises:
        UserError: when there is none of that name, or something is in its place.
    """
    source = named(name).parent
    target = Path("pipelines", source.name)
    if target.exists():
        raise UserError(f"{target}: is there already; move it away, or change it as it is")
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".asr-kd-", dir=target.parent) as aside:
        shutil.copytree(source, Path(aside, "new"), ignore=shutil.ignore_patterns("__pycache__"))
        Path(aside, "new").rename(target)
    return target


def _is_recipe(file: Path) -> bool:
    """Whether `asr-kd run` takes the folder of a YAML file; others hold what is changed of a recipe, and are run by a script."""
    return file.with_name("pipeline.yaml").is_file()


def located(text: str, recipe: Path) -> str:
    """A path as it stands in a pipeline, such as `pipelines/digits/compose.py`: where it lies.

    In a recipe that comes with the package it is what came with it; in any other pipeline, such as a changed copy, it is
    that where there is none in the working folder. All other texts stay as they are.
    """
    there = HOME / text
    ours = text.startswith(FOLDERS) and there.exists() and (recipe.is_relative_to(HOME) or not Path(text).exists())
    return str(there) if ours else text
