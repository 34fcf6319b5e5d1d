"""The page that listens: what its build refuses, and what a browser hears with it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import soxr

from asr_kd.config.load import build, override
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.decoding.transcribe import transcribe_stream
from asr_kd.errors import UserError
from asr_kd.export.job import export
from asr_kd.export.settings import ExportSettings
from tests.chromium import CHROMIUM, Page, chromium, served
from tests.export.conftest import Saved, saved, sound
from tests.models.conftest import units

__all__ = ["saved", "units"]

HERE = Path(__file__).parents[2] / "pipelines" / "live"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
STATUS, TROUBLE, TEXT = (f'document.getElementById("{name}").textContent' for name in ("status", "trouble", "text"))


@pytest.fixture(scope="module")
def live() -> ModuleType:
    spec = importlib.util.spec_from_file_location("live_build", HERE / "build.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # pydantic looks there for its types
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def exported(saved: Saved, tmp_path: Path) -> Path:
    """A folder of an export, float32 and int8."""
    saved()
    values = {"checkpoint": str(tmp_path / "checkpoint"), "output": str(tmp_path / "model"), "quantize": "int8"}
    export(ExportSettings.model_validate(values))
    return tmp_path / "model"


@pytest.fixture
def page(live: ModuleType, exported: Path, tmp_path: Path) -> Path:
    """A folder of a page, with files to hear beside it."""
    if not (HERE / "node_modules").is_dir() and not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("needs npm and node, which bring onnxruntime-web")
    try:
        live.build_page(live.LiveSettings(model=str(exported), output=str(tmp_path / "page")))
    except UserError as error:
        if "npm" not in str(error):
            raise
        pytest.skip(f"needs npm's registry once: {error}")
    for number, seconds in enumerate((2.0, 1.3, 0.7)):
        soundfile.write(tmp_path / "page" / f"{number}.wav", sound(seconds, number), 8000, subtype="PCM_16")
    (tmp_path / "page" / "text.wav").write_text("no sound at all, but words")
    return tmp_path / "page"


def test_a_model_that_a_page_cannot_use_is_refused(live: ModuleType, exported: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: str) -> None:
        with pytest.raises(UserError, match=message):
            live.build_page(live.LiveSettings(**{"model": str(exported), "output": str(tmp_path / "out"), **changes}))
        assert not (tmp_path / "out").exists()

    refused("model: .*checkpoint holds no export.json; give a folder that", model=str(tmp_path / "checkpoint"))
    refused("output: .*model is not empty and holds no page", output=str(exported))
    refused("output: .*tokens.txt is a file", output=str(exported / "tokens.txt"))
    about = json.loads((exported / "export.json").read_text())
    (exported / "export.json").write_text(json.dumps(about | {"interface": "offline"}))
    refused("model is of interface offline, the page hears with stream; export it with interface=stream")
    (exported / "export.json").write_text("{}")
    refused("model was not written by `asr-kd export`")
    (exported / "export.json").write_text(json.dumps(about))
    (exported / "model.int8.onnx").write_bytes(b"half")
    refused("model.int8.onnx is not what export.json says of it; export it again")


def test_a_missing_npm_is_named(
    live: ModuleType, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PACKAGE", tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm, which brings onnxruntime-web, is not there; install Node.js with npm"):
        live.build_page(live.LiveSettings(model=str(exported), output=str(tmp_path / "out")))


def test_the_command_line(
    live: ModuleType, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (
            [],
            "the keys model (folder that `asr-kd export interface=stream` wrote) and output (folder of the page) are missing",
        ),
        (["modle=x"], "live: command line: unknown key modle; did you mean model?"),
        ([f"model={exported}", f"output={exported}"], "is not empty"),
    ):
        monkeypatch.setattr("sys.argv", ["build.py", *words])
        assert live.main() == 2
        assert message in capsys.readouterr().err


def test_the_lock_names_no_host_and_its_page_no_address() -> None:
    lock = json.loads((HERE / "package-lock.json").read_text())
    assert all(one["integrity"].startswith("sha512-") for name, one in lock["packages"].items() if name)
    assert "://" not in (HERE / "package-lock.json").read_text()
    for path in (HERE / "page").iterdir():
        assert not re.findall(r"https?://(?!localhost)", path.read_text()), path
        assert len(path.read_text().splitlines()) < 500


def spoken(page: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `asr-kd transcribe --stream` of the checkpoint says of a file."""
    values = override({}, [f"checkpoint={page.parent / 'checkpoint'}"])
    transcribe_stream(build(TranscribeSettings, values, "transcribe"), str(page / name))
    return capsys.readouterr().out.splitlines()[-1]


def heard(browser: Page) -> str:
    """The text of a page that has heard something to its end."""
    browser.wait(f"{STATUS} === 'Done.' || {TROUBLE}")
    return str(browser.evaluate(TEXT)).strip()


@needs_chromium
def test_a_browser_hears_what_the_checkpoint_hears(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {f"{number}.wav": spoken(page, f"{number}.wav", capsys) for number in range(3)}
    assert len(texts["0.wav"].split()) > 2
    with served(page) as (address, asked), chromium(tmp_path) as browser:
        browser.open(address)
        browser.wait(f"{STATUS} === 'Ready.'")
        assert browser.evaluate("document.getElementById('network').textContent").startswith("lstm 2 × 12, int8, ")
        browser.evaluate("document.getElementById('graph').value = 'model.onnx'")
        browser.evaluate("document.getElementById('graph').dispatchEvent(new Event('change'))")
        browser.wait(f"{STATUS} === 'Ready.' && document.getElementById('network').textContent.includes('float32')")
        for name, text in texts.items():
            browser.evaluate("document.getElementById('status').textContent = ''")
            browser.choose("#file", page / name)
            assert heard(browser) == text, browser.evaluate(TROUBLE)
        # aloud, the way that a microphone's sound takes
        browser.evaluate("document.getElementById('aloud').checked = true")
        browser.choose("#file", page / "0.wav")
        browser.wait(f"{STATUS} === 'Playing 0.wav.'")
        assert heard(browser) == texts["0.wav"]
        rows = browser.evaluate("[...document.querySelectorAll('#words th')].map((one) => one.textContent)")
        assert rows[::-1] == texts["0.wav"].split()
        assert float(browser.evaluate("document.getElementById('factor').textContent")) > 0
        # by a keyboard alone
        browser.evaluate("document.activeElement.blur()")
        reached = []
        for _ in range(4):
            browser.press("Tab")
            reached.append(browser.evaluate("document.activeElement.id"))
        assert reached == ["listen", "choose", "aloud", "graph"]
        assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        # a file beside the page; and what is none
        browser.open(f"{address}?file=1.wav")
        assert heard(browser)
        browser.open(f"{address}?file=text.wav")
        assert "text.wav cannot be decoded as audio" in browser.wait(TROUBLE)
        browser.open(f"{address}?file=none.wav")
        assert browser.wait(TROUBLE).startswith("none.wav is not there (the server answers 404)")
        # neither the page nor its worker may talk to another server, even one that is there
        elsewhere = address.replace("127.0.0.1", "localhost")
        tried = f"fetch({elsewhere!r}, {{ mode: 'no-cors' }}).then(() => 'fetched', (error) => error.name)"
        worker = f"new Worker(URL.createObjectURL(new Blob([`{tried}.then(postMessage)`])))"
        assert browser.evaluate(tried) == "TypeError"
        before = len(asked)
        assert (
            browser.evaluate(f"new Promise((done) => {worker}.onmessage = ({{ data }}) => done(data))") == "TypeError"
        )
        assert len(asked) == before
        # what is not there is said, once, in a sentence
        (page / "model" / "model.int8.onnx").write_bytes(b"broken")
        browser.open(address)
        assert re.fullmatch(
            r"model/model.int8.onnx cannot be loaded \(.+\); export the network and .+\.", browser.wait(TROUBLE)
        )
        (page / "model" / "export.json").unlink()
        browser.open(address)
        assert browser.wait(TROUBLE).startswith("model/export.json, which describes the network, is not there")


@needs_chromium
def test_rates_are_converted_without_what_folds_back(page: Path, tmp_path: Path) -> None:
    script = """(async () => {
      const { Resampler } = await import("./resample.js");
      return [[48000, 8000], [44100, 16000], [8000, 16000]].map(([from, to]) => [0.3, 0.44, 0.6].map((share) => {
        const samples = Float32Array.from({ length: from }, (_, at) => Math.sin(2 * Math.PI * share * to * at / from));
        const make = (piece) => {
          const resampler = new Resampler(from, to), found = [];
          for (let at = 0; at < from; at += piece) found.push(...resampler.push(samples.subarray(at, at + piece)));
          return [...found, ...resampler.finish()];
        };
        const whole = make(from), parts = make(479);
        const middle = whole.slice(to / 8, -to / 8);
        return [whole.length, whole.every((one, at) => one === parts[at]), Math.sqrt(2 * middle.reduce((sum, one) => sum + one * one, 0) / middle.length)];
      }));
    })()"""
    with served(page) as (address, _), chromium(tmp_path) as browser:
        browser.open(address)
        for (start, end), found in zip(
            ((48000, 8000), (44100, 16000), (8000, 16000)), browser.evaluate(script), strict=True
        ):
            assert all(length == end and same for length, same, _ in found)
            kept, edge, folded = (level for _, _, level in found)
            assert np.isclose(kept, 1, atol=1e-3)
            if start > end:
                assert np.isclose(edge, 1, atol=1e-2) and folded < 1e-3


@needs_chromium
def test_a_microphone(page: Path, tmp_path: Path) -> None:
    said = soxr.resample(sound(2.0, 0), 8000, 48000)  # a microphone's rate
    soundfile.write(tmp_path / "said.wav", said, 48000, subtype="PCM_16")
    flags = ("--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={tmp_path / 'said.wav'}")
    with served(page) as (address, _), chromium(tmp_path, *flags, "--use-fake-ui-for-media-stream") as browser:
        browser.open(address)
        browser.wait(f"{STATUS} === 'Ready.'")
        browser.press("Tab")
        browser.press("Enter")
        browser.wait(f"{STATUS} === 'Listening.' && document.querySelectorAll('#words tr').length")
        assert browser.evaluate("document.getElementById('listen').textContent") == "Stop"
        browser.press("Space")
        assert heard(browser)
        assert browser.evaluate(TROUBLE) == ""
    refusing = chromium(tmp_path / "other", "--use-fake-device-for-media-stream", "--deny-permission-prompts")
    with served(page) as (address, _), refusing as browser:
        browser.open(address)
        browser.wait(f"{STATUS} === 'Ready.'")
        browser.evaluate("document.getElementById('listen').click()")
        assert browser.wait(TROUBLE).startswith("The microphone was refused. Allow it")
