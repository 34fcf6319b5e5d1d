from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import asr_kd
from asr_kd.api.soft_targets import SoftTarget
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import read_target_shard, tail_prior

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_folder_is_a_mapping_of_what_the_reader_finds(here: Path) -> None:
    targets = asr_kd.soft_targets("targets")
    expected = {}
    for path in sorted(Path("targets").glob("*.tar")):
        expected |= dict(read_target_shard(path)[1])
    assert list(targets) == list(targets.keys()) == ["u0", "u1", "u2"] == list(expected)
    assert len(targets) == 3 and (targets.frame_ms, targets.num_units) == (30, 10)
    for key, target in targets.items():
        stored = expected[key]
        assert (target.key, target.frames, target.frame_ms, target.num_units) == (key, stored.frames, 30, 10)
        for found, wanted in zip((target.indices, target.probabilities), stored.padded(4), strict=True):
            np.testing.assert_array_equal(found, wanted[:, : found.shape[1]])
        np.testing.assert_allclose(target.probabilities.sum(1) + target.tail, 1.0, atol=0.02)
    assert targets["u2"].frames == expected["u2"].frames  # of the last shard, without those before


def test_a_key_without_a_target_is_a_key_error_in_a_sentence(here: Path) -> None:
    targets = asr_kd.soft_targets("targets")
    assert "u9" not in targets and 3 not in targets and targets.get("u9") is None
    with pytest.raises(KeyError) as error:
        targets["u9"]
    assert str(error.value).startswith("targets: has no soft target of 'u9'; label its audio")
    with pytest.raises(asr_kd.UserError, match=r"^targets: broken was left out, since the teacher could not hear it: "):
        targets["broken"]


def test_dense_spreads_what_was_not_kept(here: Path) -> None:
    path = Path("targets/shard-000000.tar")
    metadata, _ = read_target_shard(path)
    prior = tail_prior(path, metadata)
    target = asr_kd.soft_targets("targets")["u0"]
    dense = target.dense()
    assert (dense.shape, dense.dtype) == ((target.frames, 10), np.float32)
    kept = np.zeros(dense.shape, bool)
    np.put_along_axis(kept, target.indices, target.probabilities > 0, 1)
    kept[target.posteriors.rows, target.posteriors.units] = True
    for how, given in (("prior", prior), ("uniform", np.full(10, 1 / 10)), ("renormalise", np.zeros(10))):
        found = target.dense(how)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-5)
        others = np.where(kept, 0.0, found)
        total = others.sum(1, keepdims=True)
        np.testing.assert_allclose(total[:, 0], target.tail if given.any() else 0, atol=0.02)
        wanted = np.where(kept, 0.0, given)
        np.testing.assert_allclose(others, total * wanted / np.maximum(wanted.sum(1, keepdims=True), 1e-9), rtol=1e-4)
    np.testing.assert_array_equal(dense.argmax(1), target.indices[:, 0])


def test_dense_where_all_units_were_kept() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(5), 7)
    target = SoftTarget("a", SparsePosteriors.from_dense(np.log(probs).astype(np.float32), 5), 30)
    np.testing.assert_allclose(target.dense("uniform"), probs, rtol=1e-4)
    with pytest.raises(asr_kd.UserError, match=r"^a: its shard has no prior; use missing_mass='uniform'"):
        target.dense()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_shards_of_every_version(version: int, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / f"targets-v{version}.tar", tmp_path / "shard-000000.tar")
    targets = asr_kd.soft_targets(tmp_path)
    assert list(targets) == ["a", "b"] and targets["b"].dense("uniform").shape == (2, 5)
    assert (targets["b"].prior is None) == (version == 1)


def test_hidden_states_of_a_layer(here: Path) -> None:
    target = asr_kd.soft_targets("targets")["u1"]
    states = target.hidden("layer.1")
    assert (states.shape, states.dtype) == ((target.frames, 16), np.float32) and states.any()
    with pytest.raises(asr_kd.UserError, match=r"^u1: no hidden states of layer\.7 are stored; it has layer\.1$"):
        target.hidden("layer.7")


@pytest.mark.parametrize("keep", ["events", "frames", "codes"])
def test_hidden_states_however_they_are_kept(keep: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "targets-v4" / f"{keep}.tar", tmp_path / "shard-000000.tar")
    for other in (GOLDEN / "targets-v4").iterdir():
        if other.suffix != ".tar":
            shutil.copy(other, tmp_path)
    first = [0, 0] if keep == "events" else [1, -1]
    assert asr_kd.soft_targets(tmp_path)["a"].hidden("layer.1").tolist() == [first, [0.5, 0.25], [0, 2]]


def test_another_frame_period(here: Path) -> None:
    target = asr_kd.soft_targets("targets")["u1"]
    half = target.resampled(60, target.frames // 2)
    assert (half.frames, half.frame_ms) == (target.frames // 2, 60)
    pairs = target.dense()[: 2 * half.frames].reshape(half.frames, 2, -1)
    np.testing.assert_allclose(half.dense(), pairs.mean(1), atol=0.02)
    with pytest.raises(asr_kd.UserError, match=r"^u1: its 26 frames of 30 ms cover 0 to 780 ms, the 90 wanted ones"):
        target.resampled(30, 90)


def test_targets_join_their_audio_and_no_other(here: Path, tmp_path: Path) -> None:
    targets = asr_kd.soft_targets("targets")
    samples = list(asr_kd.dataset("shards", handler=lambda error: True).compose(targets.join))
    assert [(one["__key__"], one["target"].key) for one in samples] == [(key, key) for key in targets]
    assert all(one["target"].frames == targets[one["__key__"]].frames and "waveform" in one for one in samples)
    other = shutil.copytree("targets", tmp_path / "targets")
    (other / "shard-000000.tar").write_bytes((other / "shard-000001.tar").read_bytes())
    with pytest.raises(asr_kd.UserError, match="answers an audio shard with SHA-256"):
        list(asr_kd.dataset("shards").compose(asr_kd.soft_targets(other).join))


def test_the_worker_of_a_loader_takes_them_along(here: Path) -> None:
    targets = asr_kd.soft_targets("targets")
    targets["u0"]
    there = pickle.loads(pickle.dumps(targets))
    np.testing.assert_array_equal(there["u2"].dense(), targets["u2"].dense())


def test_no_more_shards_than_may_be_are_in_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asr_kd.api.soft_targets.HELD", 1)
    targets = asr_kd.soft_targets("targets")
    assert [targets[key].frames for key in ("u2", "u0", "u2")] == [targets[key].frames for key in ("u2", "u0", "u2")]
    assert len(targets._held) == 1


def test_a_folder_without_targets(here: Path) -> None:
    for folder in ("student", "nothing"):
        with pytest.raises(
            asr_kd.UserError, match=f"^{folder}: holds no soft-target shards; make them with `asr-kd label`"
        ):
            asr_kd.soft_targets(folder)
    with pytest.raises(asr_kd.UserError, match=r"^talk\.wav: no such folder of soft targets"):
        asr_kd.soft_targets("talk.wav")


def test_a_shard_of_another_teacher_is_refused(here: Path, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "targets-v3.tar", tmp_path / "shard-000000.tar")
    shutil.copy("targets/shard-000001.tar", tmp_path / "shard-000001.tar")
    with pytest.raises(asr_kd.UserError, match=r"shard-000001\.tar: units of the soft targets"):
        asr_kd.soft_targets(tmp_path)["u2"]
