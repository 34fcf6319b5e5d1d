from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio

from asr_kd.errors import UserError
from asr_kd.models.acoustic import infer
from asr_kd.models.outside.bundles import bundles, file_of
from asr_kd.models.teachers import load_teacher


def write_bundle(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> Path:
    """The file of a bundle, of a network that is smaller than the published one, with the outputs that are cut off."""
    bundle = getattr(torchaudio.pipelines, name)
    cut = getattr(bundle, "_remove_aux_axis", ())
    small: dict[str, Any] = {
        "encoder_embed_dim": 16, "encoder_num_layers": 2, "encoder_num_heads": 2, "encoder_ff_interm_features": 32, "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 2, "extractor_conv_layer_config": [(8, *one[1:]) for one in bundle._params["extractor_conv_layer_config"]],
    }  # fmt: skip
    monkeypatch.setattr(bundle, "_params", bundle._params | small)
    torch.manual_seed(seed)
    whole = torchaudio.models.wav2vec2_model(
        **(bundle._params | {"aux_num_out": bundle._params["aux_num_out"] + len(cut)})
    )
    with torch.no_grad():
        whole.aux.weight.mul_(20.0)
    torch.save(whole.state_dict(), folder / file_of(bundle))
    return folder


def sounds(*samples: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, (count, 1)).astype(np.float32) for count in samples]


#: normalised by group; by layer, on normalised sound; other labels, in lower case
@pytest.mark.parametrize(
    "name", ["WAV2VEC2_ASR_BASE_960H", "WAV2VEC2_ASR_LARGE_LV60K_960H", "VOXPOPULI_ASR_BASE_10K_DE", "HUBERT_ASR_LARGE"]
)
def test_a_bundle_answers_by_utterance(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = getattr(torchaudio.pipelines, name)
    teacher = load_teacher(str(write_bundle(tmp_path, name, monkeypatch)))
    assert (teacher.settings.family, teacher.settings.network) == ("torchaudio", name)
    assert (teacher.frame_ms, teacher.features.offset_ms, teacher.features.least) == (20, 0, 400)
    batch = sounds(16000, 9000, 16000, 400, 719, 720)
    together = infer(teacher, batch)
    network = bundle.get_model(dl_kwargs={"model_dir": str(tmp_path)}).eval()
    pieces = [teacher.units.piece(unit) for unit in range(teacher.units.size)]
    assert pieces == ["∅", "<unk>", *("▁" if label == "|" else label.lower() for label in bundle.get_labels()[1:])]
    for sound, found in zip(batch, together, strict=True):
        assert np.abs(np.exp(found) - np.exp(infer(teacher, [sound])[0])).max() < 1e-5
        with torch.inference_mode():
            said = network(torch.from_numpy(sound[:, 0])[None])[0][0].softmax(-1).numpy()
        assert len(found) == len(said) == teacher.model.frames(len(sound))
        assert np.abs(np.exp(found[:, [0, *range(2, teacher.units.size)]]) - said).max() < 1e-5


@pytest.mark.parametrize("name", ["WAV2VEC2_ASR_BASE_960H", "WAV2VEC2_ASR_LARGE_LV60K_960H"])
def test_bfloat16_comes_near(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(write_bundle(tmp_path, name, monkeypatch))
    exact, near = (load_teacher(folder, precision=one) for one in ("float32", "bfloat16"))
    assert exact.fingerprint != near.fingerprint
    said = [np.exp(infer(one, sounds(9000))[0]) for one in (exact, near)]
    # in the mean: how far a single frame of a random network is off depends on the processor
    assert 1e-8 < np.abs(said[0] - said[1]).sum(-1).mean() < 0.5


def test_text_in_any_case_goes_with_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = load_teacher(str(write_bundle(tmp_path, "WAV2VEC2_ASR_BASE_960H", monkeypatch))).units
    for text in ("HE'S QUITE the Judge", "He’s quite the judge"):
        assert units.decode(units.encode(text)) == "he's quite the judge"
    assert units.unwritable("naïve 1") == ["ï", "1"]


def test_another_file_is_another_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = set()
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        marks.add(
            load_teacher(str(write_bundle(tmp_path / str(seed), "HUBERT_ASR_LARGE", monkeypatch, seed))).fingerprint
        )
    assert len(marks) == 2


def test_a_bundle_by_its_name_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    there = tmp_path / "hub" / "checkpoints"
    there.mkdir(parents=True)
    write_bundle(there, "WAV2VEC2_ASR_BASE_960H", monkeypatch)
    assert load_teacher("torchaudio:WAV2VEC2_ASR_BASE_960H").fingerprint == load_teacher(str(there)).fingerprint


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("it ran",)


def test_a_file_with_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"aux.weight": Code()}, tmp_path / file_of(bundles()["WAV2VEC2_ASR_BASE_960H"]))
    with pytest.raises(UserError, match="holds more than weights, or is damaged"):
        load_teacher(str(tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchaudio:WAV2VEC2_BASE", "no such bundle with CTC posteriors; it has .*WAV2VEC2_ASR_BASE_960H"),
        ("torchaudio:EMFORMER_RNNT_BASE_LIBRISPEECH", "no such bundle with CTC posteriors"),
        ("torchaudio:", "no such bundle"),
    ],
)
def test_an_unknown_bundle(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_teacher(name)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        UserError, match=r"cannot be had .*fetch wav2vec2_\w+\.pth where there is a network, and give the folder"
    ):
        load_teacher("torchaudio:WAV2VEC2_ASR_BASE_960H")


def test_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bundle(tmp_path, "WAV2VEC2_ASR_BASE_960H", monkeypatch)
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=str(folder)):
        load_teacher(str(folder))


def test_two_bundles_in_a_folder(tmp_path: Path) -> None:
    for name in ("HUBERT_ASR_LARGE", "WAV2VEC2_ASR_BASE_960H"):
        (tmp_path / file_of(bundles()[name])).write_bytes(b"")
    with pytest.raises(UserError, match=r"holds the weights of .* and .*; keep one file a folder"):
        load_teacher(str(tmp_path))
