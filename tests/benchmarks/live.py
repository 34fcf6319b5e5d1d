"""How late words are on the page that listens, and what it takes, in headless Chromium:

    python -m tests.benchmarks.live page RECORDING.wav

The recording is heard as a file, as fast as it goes, and through a microphone, at its own pace.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.chromium import Page, chromium, served

STATUS = "document.getElementById('status').textContent"
FIGURES = ("seconds", "count", "by-sound", "by-computing", "factor")


def figures(browser: Page) -> str:
    """What the page says when it is done."""
    browser.wait(f"{STATUS} === 'Done.'")
    return " | ".join(browser.evaluate(f"document.getElementById('{name}').textContent") for name in FIGURES)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="folder that pipelines/live/build.py wrote")
    parser.add_argument("recording", type=Path, help="a WAV of a minute or so")
    given = parser.parse_args()
    recording = given.recording.resolve()
    flags = (
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={recording}%noloop",
    )
    print(
        "| network | heard | sound | words | delay by sound | by computing | real-time factor |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, served(given.page) as (address, _):
        for graph in ("int8", "float32"):
            with chromium(Path(folder) / graph, *flags) as browser:
                browser.open(address)
                browser.wait(f"{STATUS} === 'Ready.'")
                browser.evaluate(
                    f"document.getElementById('graph').value = [...document.getElementById('graph')].find((one) => one.text === '{graph}').value"
                )
                browser.evaluate("document.getElementById('graph').dispatchEvent(new Event('change'))")
                browser.wait(
                    f"{STATUS} === 'Ready.' && document.getElementById('network').textContent.includes('{graph}')"
                )
                browser.choose("#file", recording)
                said = figures(browser)
                print(f"| {graph} | file | {said} |", flush=True)
                browser.evaluate("document.getElementById('listen').click()")
                browser.wait(f"parseFloat(document.getElementById('seconds').textContent) >= {said.split()[0]}")
                browser.evaluate("document.getElementById('listen').click()")
                print(f"| {graph} | microphone | {figures(browser)} |", flush=True)


if __name__ == "__main__":
    main()
