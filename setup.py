"""What pyproject.toml cannot say: recipes and their data lie beside the package in a clone, and within it in a wheel (asr_kd/recipes.py finds them)."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
SHIPPED = {f"asr_kd.shipped.{name}": name for name in ("pipelines", "data_manifests")}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def linked(text: str, target: Callable[[str], str | None]) -> str:
    """Markdown with another target for each relative link; where there is none, the words of the link alone."""

    def one(found: re.Match[str]) -> str:
        words, link = found.groups()
        if re.match(r"\w+:|#", link):
            return found[0]
        path, mark, anchor = link.partition("#")
        new = target(path)
        return words if new is None else f"[{words}]({new}{mark}{anchor})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)  # every second one is code
    return "".join(part if index % 2 else LINK.sub(one, part) for index, part in enumerate(parts))


class Build(build_py):
    """Links of READMEs lead to where the files lie in the wheel."""

    def run(self) -> None:
        """Copy everything, then change the copies of READMEs."""
        super().run()
        if self.editable_mode:  # nothing was copied
            return
        lib = Path(self.build_lib).resolve()
        for file in lib.rglob("*.md"):
            place = file.relative_to(lib)
            source = place.relative_to("asr_kd/shipped") if place.is_relative_to("asr_kd/shipped") else place

            def there(path: str, file: Path = file, source: Path = source) -> str | None:
                wanted = Path(os.path.normpath(ROOT / source.parent / path)).relative_to(ROOT)
                places = [lib / wanted, lib / "asr_kd/shipped" / wanted]
                return next((os.path.relpath(one, file.parent) for one in places if one.exists()), None)

            file.write_text(linked((ROOT / source).read_text(encoding="utf-8"), there), encoding="utf-8")


setup(
    packages=[*find_namespace_packages(include=["asr_kd*"]), *SHIPPED],
    package_dir=SHIPPED,
    cmdclass={"build_py": Build},
    # a package's page lies beside no file
    long_description=linked((ROOT / "README.md").read_text(encoding="utf-8"), lambda _: None),
    long_description_content_type="text/markdown",
)
