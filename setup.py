"""What pyproject.toml cannot say: recipes and their data lie beside the package in a clone, and within it in a wheel (asr_kd/recipes.py finds them)."""

from setuptools import find_namespace_packages, setup

SHIPPED = {f"asr_kd.shipped.{name}": name for name in ("pipelines", "data_manifests")}

setup(packages=[*find_namespace_packages(include=["asr_kd*"]), *SHIPPED], package_dir=SHIPPED)
