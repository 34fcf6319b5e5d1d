"""A folder with a page that listens: an exported student in a browser, for any file server.

    python pipelines/live/build.py model=FOLDER output=FOLDER

`model` is what `asr-kd export interface=stream` wrote. onnxruntime-web comes from npm, by the lock beside this file, the first time; the
folder needs nothing else afterwards.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import Field

from asr_kd.config.base import Location, Settings
from asr_kd.config.load import build, override
from asr_kd.errors import UserError
from asr_kd.files import clear_errors, local, read_json, sha256_file

HERE = Path(__file__).parent
PAGE = HERE / "page"
#: files of an exported folder, as `asr_kd.export.running` names them, which takes packages that a page does not need
DESCRIPTION, MODEL, QUANTIZED, TOKENS = "export.json", "model.onnx", "model.int8.onnx", "tokens.txt"
#: what a browser loads of onnxruntime-web, and the folder of it
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
PACKAGE = HERE / "node_modules" / "onnxruntime-web"


class LiveSettings(Settings):
    """An exported student → a folder with a page that listens."""

    model: Location = Field(description="folder that `asr-kd export interface=stream` wrote")
    output: Location = Field(description="folder of the page")


def build_page(settings: LiveSettings) -> None:
    """Write the folder, whole or not at all; an earlier page makes way.

    Raises:
        UserError: when the model is none that a page can hear with, npm is missing or fails, or the output belongs to something else.
    """
    model, output = local(settings.model, "model"), local(settings.output, "output")
    files = model_files(model)
    _check_free(output)
    runtime = runtime_files()
    with clear_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as aside:
            made = Path(aside) / "page"
            shutil.copytree(PAGE, made)
            for folder, paths in (("onnxruntime", runtime), ("model", files)):
                (made / folder).mkdir()
                for path in paths:
                    shutil.copyfile(path, made / folder / path.name)
            if output.exists():
                output.rename(Path(aside) / "earlier")
            made.rename(output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:,.1f} MB; serve it with `python -m http.server --directory {output}`")


def model_files(model: Path) -> list[Path]:
    """The files of an exported folder that a page needs, as they were written; UserError when it is none, or of another interface."""
    if not (model / DESCRIPTION).is_file():
        raise UserError(
            f"model: {model} holds no {DESCRIPTION}; give a folder that `asr-kd export interface=stream` wrote"
        )
    about = read_json(model / DESCRIPTION, "export")
    if (
        not isinstance(about, dict)
        or about.get("format") != "asr_kd-export"
        or not isinstance(about.get("files"), dict)
    ):
        raise UserError(f"model: {model} was not written by `asr-kd export`; give such a folder")
    if about.get("interface") != "stream":
        raise UserError(
            f"model: {model} is of interface {about.get('interface')}, the page hears with stream; export it with interface=stream"
        )
    names = [name for name in (MODEL, QUANTIZED, TOKENS) if name in about["files"]]
    for name in names:
        if not (model / name).is_file() or sha256_file(model / name) != about["files"][name].get("sha256"):
            raise UserError(f"model: {model / name} is not what {DESCRIPTION} says of it; export it again")
    return [model / name for name in (DESCRIPTION, *names)]


def runtime_files() -> list[Path]:
    """The files of onnxruntime-web in the version of the lock, fetched where they are missing; UserError when that fails."""
    version = read_json(HERE / "package-lock.json")["packages"]["node_modules/onnxruntime-web"]["version"]
    with clear_errors(HERE / "node_modules"), open(HERE / "package-lock.json", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds fetch one after the other
        if _version() != version:
            _fetch()
    return [PACKAGE / "dist" / name for name in RUNTIME]


def _version() -> str | None:
    path = PACKAGE / "package.json"
    return json.loads(path.read_text())["version"] if path.is_file() else None


def _fetch() -> None:
    if not (npm := shutil.which("npm")) or not shutil.which("node"):
        raise UserError(
            "npm, which brings onnxruntime-web, is not there; install Node.js with npm (Debian: apt-get install npm)"
        )
    print("fetching onnxruntime-web", file=sys.stderr)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.split("npm error")[-1].strip() for line in done.stderr.splitlines() if "npm error" in line]
        raise UserError(
            f"npm ci in {HERE} failed ({' '.join(said[:2]) or 'it says nothing'}); it needs npm's registry once"
        )


def _check_free(output: Path) -> None:
    """Refuse a folder that holds something else than an earlier page."""
    if output.is_file():
        raise UserError(f"output: {output} is a file, not a folder; choose another output folder")
    if output.exists() and any(output.iterdir()) and not (output / "worklet.js").is_file():
        raise UserError(f"output: {output} is not empty and holds no page of an earlier build; choose another folder")


def main() -> int:
    """Build what the command line says."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    try:
        build_page(build(LiveSettings, override({}, sys.argv[1:]), "live", sys.argv[1:]))
    except UserError as error:
        print(f"live: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
