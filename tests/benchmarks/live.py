"""How late words are on the page that listens, and what it takes, in headless Chromium:

    python -m tests.benchmarks.live page RECORDING.wav …

The recordings are heard in one, as a file, as fast as it goes, and through a microphone, at its own pace.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from tests.chromium import Page, chromium, served

STATUS = "document.getElementById('status').textContent"
HEAD = ("network", "heard", "sound", "words", "delay by sound", "delay by computing", "real-time factor")
FIGURES = ("seconds", "count", "by-sound", "by-computing", "factor")


def figures(browser: Page) -> str:
    """What the page says when it is done."""
    browser.wait(f"{STATUS} === 'Done.'")
    return " | ".join(browser.evaluate(f"document.getElementById('{name}').textContent") for name in FIGURES)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="folder that pipelines/live/build.py wrote")
    parser.add_argument("recordings", type=Path, nargs="+", help="WAV of one rate, a minute or so in all")
    given = parser.parse_args()
    sound = [soundfile.read(one, dtype="int16") for one in given.recordings]
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, served(given.page) as (address, _):
        recording = Path(folder) / "recording.wav"
        soundfile.write(recording, np.concatenate([samples for samples, _ in sound]), sound[0][1])
        flags = (
            "fake-device-for-media-stream",
            "fake-ui-for-media-stream",
            f"file-for-fake-audio-capture={recording}%noloop",
        )
        for graph, name in (("int8", "model.int8.onnx"), ("float32", "model.onnx")):
            with chromium(Path(folder) / graph, *(f"--use-{flag}" for flag in flags)) as browser:
                browser.open(address)
                browser.wait(f"{STATUS} === 'Ready.'")
                browser.evaluate(f"document.getElementById('graph').value = '{name}'")
                browser.evaluate("document.getElementById('graph').dispatchEvent(new Event('change'))")
                browser.wait(
                    f"{STATUS} === 'Ready.' && document.getElementById('network').textContent.includes('{graph}')"
                )
                browser.choose("#file", recording)
                said = figures(browser)
                print(f"| {graph} | file | {said} |", flush=True)
                browser.evaluate("document.getElementById('listen').click()")
                browser.wait(f"{STATUS} === 'Listening.'")
                browser.wait(f"parseFloat(document.getElementById('seconds').textContent) >= {said.split()[0]}")
                browser.evaluate("document.getElementById('listen').click()")
                print(f"| {graph} | microphone | {figures(browser)} |", flush=True)


if __name__ == "__main__":
    main()
