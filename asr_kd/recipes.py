"""Recipes that come with the package: the same folders lie within it where it was installed from a wheel, and beside it in a clone."""

from __future__ import annotations

from pathlib import Path

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
