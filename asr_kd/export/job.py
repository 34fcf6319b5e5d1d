"""The verb `export`, from the top: `export` is the whole job."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asr_kd.audio.blas import one_thread
from asr_kd.audio.features import version_of
from asr_kd.errors import UserError
from asr_kd.export.settings import ExportSettings
from asr_kd.files import clear_errors, local, read_json, sha256_file, write_json, write_whole
from asr_kd.models.acoustic import OwnCheckpoint, load_checkpoint
from asr_kd.shards.tarset import read_index
from asr_kd.summary import tell_summary

if TYPE_CHECKING:
    import onnx

FORMAT, VERSION = "asr_kd-export", 1


@one_thread()
def export(settings: ExportSettings) -> bool:
    """Write a folder with a graph of a checkpoint, whole or not at all; returns False, and writes nothing, when a check does not hold.

    The same checkpoint and packages give the same bytes.

    Raises:
        UserError: when the checkpoint does not fit the interface, a package is missing, or the output belongs to something else.
    """
    _needed()
    from asr_kd.export.card import write_card
    from asr_kd.export.checking import LIMITS, compare
    from asr_kd.export.quantize import quantized
    from asr_kd.export.running import DESCRIPTION, MODEL, QUANTIZED, TOKENS
    from asr_kd.export.sherpa import sherpa_runs
    from asr_kd.export.tokens import tokens_of

    torch.set_num_threads(settings.threads)
    output = local(settings.output, "output")
    checkpoint = load_checkpoint(settings.checkpoint)
    data = settings.check and read_index(settings.check).hash
    asked = {
        "fingerprint": checkpoint.fingerprint, "interface": settings.interface, "quantize": settings.quantize, "check": data,
    }  # fmt: skip
    _check_free(output, asked)
    tokens = tokens_of(checkpoint.units, settings.interface, sherpa_runs(settings.interface, checkpoint.features))
    model, described = _graph(settings, checkpoint)
    with _aside(output) as folder:
        with write_whole(folder / MODEL) as file:
            file.write(model.SerializeToString(deterministic=True))
        with write_whole(folder / TOKENS, "w") as file:
            file.write(tokens)
        if settings.quantize:
            with write_whole(folder / QUANTIZED) as file:
                file.write(
                    quantized(folder / MODEL, bool(checkpoint.settings.bits)).SerializeToString(deterministic=True)
                )
        checked, problems = None, []
        if settings.check is not None:
            found = compare(settings, checkpoint, folder, described)
            checked = {"data": data, **{name: one.figures() for name, one in found.items()}}
            for name, one in found.items():
                print(f"{name}: {one.told()}")
                problems += [f"{name}: {what}" for what in one.beyond(LIMITS[name.startswith(QUANTIZED)])]
        figures = {"interface": settings.interface, "checked": checked}
        tell_summary(figures={**figures, "problems": problems})
        if problems:
            print("\n".join(problems))
            print(f"{output}: not written, the graph does not say what {settings.checkpoint} says")
            return False
        files: dict[str, dict[str, Any]] = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.iterdir())
        }
        description = {
            "format": FORMAT, "version": VERSION, **asked, "units_hash": checkpoint.units.hash, "units": checkpoint.units.size,
            "model": checkpoint.settings.model_dump(), "features": checkpoint.features.model_dump(), "frontend": version_of(checkpoint.features),
            "multiplied_out": bool(checkpoint.settings.rank or checkpoint.settings.projection), "frame_ms": checkpoint.frame_ms, "lookahead_ms": checkpoint.lookahead_ms, **described, "files": files,
            "versions": _versions(), "checked": checked,
        }  # fmt: skip
        write_json(folder / DESCRIPTION, description)
        write_card(folder, settings, checkpoint, description)
        with clear_errors(output):
            _publish(folder, output)
    tell_summary(output, figures={**figures, "problems": [], "files": files})
    sizes = ", ".join(f"{name} {one['bytes'] / 1e6:,.2f} MB" for name, one in files.items() if name.endswith(".onnx"))
    print(f"{output}: {checkpoint.settings.shape} as {settings.interface}, {sizes}")
    return True


def _needed() -> None:
    for name in ("onnx", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            raise UserError(f"export: {name} is not installed; run `pip install 'asr-kd[export]'`") from None


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("asr-kd", "torch", "onnx", "onnxruntime")}


def _graph(settings: ExportSettings, checkpoint: OwnCheckpoint) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model, and what export.json says of its interface alone."""
    from asr_kd.export.offline import offline_model
    from asr_kd.export.streaming import longest_seconds, shape_of, stream_model, t_one_model, t_one_timing
    from asr_kd.export.zipformer2 import zipformer2_model, zipformer2_timing

    metadata = {
        "asr_kd_fingerprint": checkpoint.fingerprint, "asr_kd_units": checkpoint.units.hash, "asr_kd_interface": settings.interface
    }  # fmt: skip
    version = importlib.metadata.version("asr-kd")
    longest = {"longest_call_seconds": longest_seconds(checkpoint)}
    if settings.interface == "offline":
        hears = "sound" if checkpoint.features.kind == "own" else "features"
        return offline_model(checkpoint, metadata, version), {"hears": hears, **longest}
    if settings.interface == "zipformer2":
        return zipformer2_model(checkpoint, metadata, version), zipformer2_timing(checkpoint)
    shape = shape_of(checkpoint)
    if settings.interface == "t-one":
        return t_one_model(checkpoint, metadata, version), t_one_timing(checkpoint, shape)
    own = {"state": shape.state, "frame_samples": shape.period, "first_frame_samples": shape.reach}
    return stream_model(checkpoint, metadata, version), {**own, **longest}


def _check_free(output: Path, asked: dict[str, Any]) -> None:
    """Refuse a folder that holds something else than an earlier export of the same."""
    from asr_kd.export.running import DESCRIPTION

    if output.is_file():
        raise UserError(f"{output}: is a file, not a folder; choose another output folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / DESCRIPTION).is_file():
        raise UserError(f"{output}: is not empty and was not written by `asr-kd export`; choose another folder")
    theirs = read_json(output / DESCRIPTION, "export")
    differing = [key for key, value in asked.items() if not isinstance(theirs, dict) or theirs.get(key) != value]
    if differing:
        key = differing[0]
        was = theirs.get(key) if isinstance(theirs, dict) else None
        raise UserError(
            f"{output}: holds another export ({key} was {was}, now {asked[key]}); choose another output folder or remove it"
        )


@contextlib.contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """A folder beside `output`, gone afterwards; those that killed processes have left are removed."""
    with clear_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in output.parent.glob(f".{output.name}.*.tmp"):
            with contextlib.suppress(OSError), _held(left):
                shutil.rmtree(left)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
        folder.chmod(0o755)
    with _held(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock on a folder, which says that its writer lives; OSError where another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _publish(folder: Path, output: Path) -> None:
    """Give a finished folder its name; an earlier export of the same makes way."""
    if output.exists():
        earlier = folder / "earlier"
        os.rename(output, earlier)
    os.rename(folder, output)
    shutil.rmtree(output / "earlier", ignore_errors=True)
