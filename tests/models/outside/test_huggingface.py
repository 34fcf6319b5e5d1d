from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch

from asr_kd.models.acoustic import infer
from asr_kd.models.teachers import load_teacher
from tests import outside

FAMILIES = [
    *((kind, by_layer) for kind in outside.WAVES for by_layer in (False, True)),
    *((kind, None) for kind in outside.OTHERS),
]
#: period of a frame, and start of the first one, in milliseconds, where they are others than those of our own features of 20 ms
FRAMES = {"ParakeetCTC": (80, -48), "LasrCTC": (40, 45), "GraniteSpeech5CTC": (80, -12)}


def sounds(*samples: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, (count, 1)).astype(np.float32) for count in samples]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, by_layer = request.param
    if by_layer is None:
        return outside.write_other(tmp_path_factory.mktemp(kind), kind)
    return outside.write_wave(tmp_path_factory.mktemp(kind), kind, by_layer)


def test_what_is_said_of_an_utterance_does_not_depend_on_its_batch(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    batch = sounds(16000, 9000, 16000, 4321)
    together = infer(teacher, batch)
    for sound, found in zip(batch, together, strict=True):
        alone = infer(teacher, [sound])[0]
        assert np.abs(np.exp(found) - np.exp(alone)).max() < 1e-5
    assert np.exp(together[0]).std(0).max() > 1e-4  # it says something


def test_it_is_the_model_of_its_own_program(folder: Path) -> None:
    import transformers

    teacher = load_teacher(str(folder))
    network = transformers.AutoModelForCTC.from_pretrained(folder).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    sound = sounds(9000)[0]
    with torch.inference_mode():
        inputs = extractor([sound[:, 0]], sampling_rate=16000, return_tensors="pt")
        said = network(**inputs).logits[0].softmax(-1)
    found = np.exp(infer(teacher, [sound])[0])
    tokens = json.loads((folder / "vocab.json").read_text())
    spoken = [tokens[token] for token in ("<pad>", "<unk>", "|", *outside.LETTERS)]  # all but <s> and </s>
    wanted = (said[:, spoken] / said[:, spoken].sum(-1, keepdim=True)).numpy()
    assert len(wanted) - len(found) in (0, 1)  # a last frame that is padding in part is left out
    assert np.abs(found[:, : len(spoken)] - wanted[: len(found)]).max() < 1e-5
    assert [teacher.units.piece(unit) for unit in range(4)] == ["∅", "<unk>", "▁", "e"]


def test_frames_are_known_before_the_network_runs(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    lengths = [teacher.features.least + more for more in (0, 1, 319, 320, 639, 640, 5000, 16000, 16001)]
    found = infer(teacher, sounds(*lengths))
    assert [len(one) for one in found] == [teacher.model.frames(count) for count in lengths]
    assert len(found[0]) >= 1
    kind = next((one for one in FRAMES if folder.name.startswith(one)), "")
    assert (teacher.features.frame_ms, teacher.features.offset_ms) == FRAMES.get(kind, (20, 0))


def test_bfloat16_comes_near_and_hears_the_same(folder: Path) -> None:
    """Autocast is of the network: the front end, which for some families is arithmetic of torch too, is exact."""
    teachers = [load_teacher(str(folder)), load_teacher(str(folder), precision="bfloat16")]
    assert teachers[0].fingerprint != teachers[1].fingerprint
    assert teachers[1].settings.shape.endswith("(huggingface, bfloat16)")
    given: list[torch.Tensor] = []
    for teacher in teachers:
        main = teacher.model.network.main_input_name
        teacher.model.network.register_forward_pre_hook(
            lambda _, args, said, main=main: given.append(said[main]), with_kwargs=True
        )
    batch = sounds(16000, 9000, 16000)
    exact, near = (infer(teacher, batch) for teacher in teachers)
    assert near[0].dtype == np.float32
    apart = [np.abs(np.exp(one) - np.exp(other)).sum(-1) for one, other in zip(exact, near, strict=True)]
    # of 2, in the mean: how far a single frame of a random network is off depends on the processor
    assert 1e-8 < np.concatenate(apart).mean() < 0.5
    with torch.autocast("cpu", torch.bfloat16):  # as in a step of training
        in_step = infer(teachers[0], batch)
    assert all(np.abs(np.exp(one) - np.exp(other)).max() < 0.01 for one, other in zip(near, in_step, strict=True))
    thirds = [given[at :: len(given) // 3] for at in range(len(given) // 3)]
    assert thirds and all(torch.equal(third[0], one) for third in thirds for one in third[1:])


@pytest.mark.parametrize("kind", ["Wav2Vec2Bert", "ParakeetCTC", "LasrCTC", "GraniteSpeech5CTC"])
def test_frames_hear_where_they_are_said_to_be(kind: str, tmp_path: Path) -> None:
    """A click changes most what is said of the frame that lies around it."""
    teacher = load_teacher(str(outside.write_other(tmp_path, kind)))
    quiet = sounds(64000)[0] * 0.1
    click = quiet.copy()
    click[32000 - 80 : 32000 + 80] += 2.0
    before, after = infer(teacher, [quiet])[0], infer(teacher, [click])[0]
    changed = np.abs(np.exp(before) - np.exp(after)).sum(1)
    around = np.arange(changed.argmax() - 3, changed.argmax() + 4)
    middle = float((around * changed[around]).sum() / changed[around].sum()) + 0.5
    heard_ms = teacher.features.offset_ms + middle * teacher.features.frame_ms
    assert heard_ms == pytest.approx(2000, abs=30)
