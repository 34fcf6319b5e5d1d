"""Soft targets for people: a shard's metadata, and an utterance as a table or as a picture under its spectrogram."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from asr_kd.audio.decode import decode as decode_audio
from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import UserError, check_installed
from asr_kd.files import Place, names_in, place, write_whole
from asr_kd.shards.tarset import read_index, read_listed
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.settings import InspectSettings
from asr_kd.targets.store import TargetMetadata, read_target_shard
from asr_kd.units import load_units

#: longest audio that can be drawn
MAX_SECONDS = 3600.0
#: units a frame in the table
COLUMNS = 5
#: rows of the picture: the units with most mass
ROWS = 24


def inspect(settings: InspectSettings) -> None:
    """Print a soft-target shard, or one utterance of it; with `png`, draw the utterance. A UserError when it is not there."""
    if settings.png:
        check_installed("png", "matplotlib", "report")
    path = _shard(settings)
    metadata, pairs = read_target_shard(path)
    units = load_units(settings.units) if settings.units else None
    if units is not None and units.hash != metadata.units_hash:
        raise UserError(
            f"{path}: is of units {metadata.units_hash}, {settings.units} has {units.hash}; give its own units"
        )
    name: Callable[[int], str] = str if units is None else units.piece
    if settings.key is None:
        _print_shard(path, metadata, list(pairs), settings.rows)
        return
    target = next((target for key, target in pairs if key == settings.key), None)
    if target is None:
        reason = metadata.quarantined.get(settings.key)
        why = f"was quarantined ({reason})" if reason else "is not there; leave out key to list what is"
        raise UserError(f"{path}: {settings.key} {why}")
    _print_utterance(settings.key, metadata, target, name, settings.rows)
    if settings.png:
        spectrum = (
            _spectrum(settings.audio, path.name, settings.key, metadata.features.shown) if settings.audio else None
        )
        draw(settings.png, settings.key, target, metadata.frame_ms, name, spectrum)
        print(settings.png)


def _shard(settings: InspectSettings) -> Place:
    """The shard to show: the one given, or the one in the folder that holds the key."""
    path = place(settings.targets)
    if not path.is_dir():
        return path
    shards = [path / name for name in sorted(names_in(path)) if name.endswith(".tar")]
    if not shards:
        raise UserError(f"{path}: holds no soft-target shards; make them with `asr-kd label`")
    if settings.key is None:
        return shards[0]
    for shard in shards:
        metadata, pairs = read_target_shard(shard)
        if settings.key in metadata.quarantined or any(key == settings.key for key, _ in pairs):
            return shard
    raise UserError(f"{path}: no shard holds {settings.key}; check the key")


def _print_shard(path: Place, metadata: TargetMetadata, pairs: list[tuple[str, SparsePosteriors]], rows: int) -> None:
    kept = ", ".join(f"{key} {value}" for key, value in metadata.selection.model_dump(exclude_none=True).items())
    statistics = metadata.statistics.model_dump(exclude_none=True)
    for title, text in {
        "shard": path,
        "teacher": metadata.teacher,
        "units": f"{metadata.num_units} ({metadata.units_hash})",
        "frame": f"{metadata.frame_ms} ms from {metadata.offset_ms} ms on",
        "kept": kept,
        "codec": f"version {metadata.codec.version}, {metadata.codec.levels} levels",
        **_hidden(metadata),
        "audio": f"SHA-256 {metadata.audio_sha256}",
        **{key: f"{value:,.6g}" for key, value in statistics.items()},
        "quarantined": len(metadata.quarantined),
    }.items():
        print(f"{title:<18} {text}")
    print(f"\n{'key':<28} {'frames':>7} {'entries a frame':>16} {'mass kept':>10}")
    for key, target in pairs[:rows]:
        print(
            f"{key:<28} {target.frames:>7} {len(target.units) / target.frames:>16.2f} {1 - target.tail.mean():>10.5f}"
        )
    if len(pairs) > rows:
        print(f"… and {len(pairs) - rows} more; rows={len(pairs)} shows all, key=KEY one of them")
    for key, reason in list(metadata.quarantined.items())[:rows]:
        print(f"{key:<28} quarantined: {reason}")


def _hidden(metadata: TargetMetadata) -> dict[str, str]:
    """What there is of hidden states: what is kept, and of each tap its width and what was lost."""
    held = metadata.hidden
    if held is None:
        return {}
    codes = f", {held.codebooks} codebooks of quantiser {held.quantiser}" if held.quantiser else ""
    kept = f"{held.keep}, {held.rows:,} rows, {held.bytes_per_frame:,.2f} bytes a frame{codes}"
    taps = {f"  {tap}": f"width {width}, {held.lost[tap]:.3g} of its variance lost" for tap, width in held.taps.items()}
    return {"hidden states": kept, **taps}


def _print_utterance(
    key: str, metadata: TargetMetadata, target: SparsePosteriors, name: Callable[[int], str], rows: int
) -> None:
    print(
        f"{key}: {target.frames} frames of {metadata.frame_ms} ms, {len(target.units) / target.frames:.2f} entries a frame"
    )
    print(f"{'seconds':>8}  {'left over':>9}  units and their probabilities, the best {COLUMNS}")
    units, probs = target.padded(COLUMNS)
    for frame in range(min(rows, target.frames)):
        seconds = (metadata.offset_ms + frame * metadata.frame_ms) / 1000
        best = [
            f"{name(int(unit))} {prob:.3f}" for unit, prob in zip(units[frame], probs[frame], strict=True) if prob > 0
        ]
        print(f"{seconds:>8.2f}  {target.tail[frame]:>9.5f}  {'  '.join(best)}")
    if target.frames > rows:
        print(f"… and {target.frames - rows} more; rows={target.frames} shows all")


def _spectrum(folder: str | list[str], shard: str, key: str, features: FeatureSettings) -> np.ndarray:
    """float16 [hops, mels], the features of an utterance of a shard before stacking."""
    found = next((info for info in read_index(folder) if info.name == shard), None)
    for sample in read_listed(folder, found) if found else ():
        if sample.key == key:
            waveform, _ = decode_audio(sample.audio, key, features.sample_rate, MAX_SECONDS)
            return Frontend(features).compute(waveform).reshape(-1, features.mels)
    raise UserError(f"{folder}/{shard}: {key} is not there; give the audio that these targets answer")


def draw(
    path: str,
    key: str,
    target: SparsePosteriors,
    frame_ms: int,
    name: Callable[[int], str],
    spectrum: np.ndarray | None,
) -> None:
    """Write a PNG: the probabilities over time of the units with most mass, under the spectrum if there is one.

    Args:
        name: gives the name of a unit id.
        spectrum: float [hops, mels].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    probs = np.exp(target.log_probs)
    mass = np.bincount(target.units, probs, target.num_units)
    chosen = np.argsort(-mass, kind="stable")[: min(ROWS, int((mass > 0).sum()))]
    line = np.full(target.num_units, -1)  # line of the picture of each unit
    line[chosen] = np.arange(len(chosen))
    shown = line[target.units] >= 0
    image = np.zeros((len(chosen), target.frames))
    image[line[target.units][shown], target.rows[shown]] = probs[shown]

    seconds = target.frames * frame_ms / 1000
    figure = Figure(figsize=(min(40.0, max(8.0, 4 * seconds)), 8 if spectrum is not None else 5), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(2 if spectrum is not None else 1, 1, sharex=True, squeeze=False)[:, 0]
    plots[0].set(title=key)
    if spectrum is not None:
        extent = (0, seconds, 0, spectrum.shape[1])
        plots[0].imshow(spectrum.T, origin="lower", aspect="auto", extent=extent, cmap="magma")
        plots[0].set(ylabel="mel band")
    picture = plots[-1].imshow(
        image, aspect="auto", extent=(0, seconds, len(chosen) - 0.5, -0.5), cmap="viridis", vmin=0, vmax=1,
        interpolation="nearest",
    )  # fmt: skip
    plots[-1].set_yticks(range(len(chosen)), [name(int(unit)) for unit in chosen])
    plots[-1].set(xlabel="seconds", ylabel="unit, by its mass")
    figure.colorbar(picture, ax=plots[-1], label="probability")
    with write_whole(path) as file:
        figure.savefig(file, format="png", dpi=100)
