"""How large the report's page is, and how soon it opens in headless Chromium, by the number of utterances (three systems).

python -m tests.benchmarks.report_page [--utterances 1000 10000 100000] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from asr_kd.evaluation.page import render_html
from asr_kd.evaluation.samples import Evidence
from asr_kd.evaluation.utterances import pack, read_lines
from tests.benchmarks.tables import print_rows
from tests.evaluation.made import changed, line, report_of, system

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SYSTEMS = {"teacher": 0.05, "baseline": 0.11, "student": 0.07}
DRIVER = """
<iframe id="page" src="report.html" style="width:1200px;height:900px"></iframe>
<script>
(async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms)), frame = document.getElementById("page");
  await new Promise((done) => frame.addEventListener("load", done));
  const page = frame.contentDocument, clock = frame.contentWindow.performance;
  const loaded = clock.getEntriesByType("navigation")[0].domContentLoadedEventEnd;
  while (!page.documentElement.dataset.ready) await wait(10);
  const ready = clock.now();
  const timed = (work) => { const began = clock.now(); work(); return clock.now() - began; };
  const sort = timed(() => page.querySelectorAll("#rows thead button")[2].click());
  const status = page.getElementById("status"), before = status.textContent, search = page.getElementById("search");
  search.value = "the and"; search.dispatchEvent(new Event("input"));
  const began = clock.now();
  while (status.textContent === before) await wait(5);
  const found = clock.now() - began - 150; // that long it waits for further keys
  while (!clock.getEntriesByName("first-contentful-paint").length) await wait(10);
  const paint = clock.getEntriesByName("first-contentful-paint")[0].startTime;
  console.log("FIGURES " + JSON.stringify({ paint, loaded, ready, sort, search: found }) + " END");
})();
</script>
"""


def made_lines(count: int) -> Iterator[dict[str, Any]]:
    """Utterances of 3 to 30 words, a thousand a shard; words are wrong at a system's rate.

    Words are of 2 to 9 letters, 20,000 of them, as frequent as Zipf says.
    """
    chance = random.Random(0)
    letters = "eeettaaooinnsshrrdllcumwfgypbvk"
    vocabulary = ["the", "and", *("".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(20_000))]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(vocabulary) + 1)))

    def some(number: int) -> list[str]:
        return chance.choices(vocabulary, cum_weights=weights, k=number)

    for shard in range(0, count, 1000):
        texts = [some(chance.randint(3, 30)) for _ in range(min(1000, count - shard))]
        for name, rate in SYSTEMS.items():
            for index, words in enumerate(texts):
                heard = [some(1)[0] if chance.random() < rate else one for one in words if chance.random() > rate / 5]
                yield line(
                    name, f"speaker-{index % 100:03}-{shard + index:06}", " ".join(words), " ".join(heard),
                    shard=f"shard-{shard // 1000:06}.tar", speaker=f"speaker-{index % 100:03}", seconds=len(words) / 2.5,
                )  # fmt: skip


def open_page(folder: Path) -> dict[str, float | None]:
    """Milliseconds to the first paint, to the page without the table, to the table, to sort it, and to search it."""
    (folder / "driver.html").write_text(DRIVER)
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", (folder / "driver.html").as_uri(),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as browser:
        assert browser.stderr is not None
        for text in browser.stderr:
            if found := re.search(r"FIGURES (.*) END", text):
                browser.terminate()
                return json.loads(found[1])
    raise SystemExit("Chromium ended before the page was ready")


def measure(count: int) -> dict[str, Any]:
    """One row of the table."""
    report = report_of({name: system(int(100 * rate)) for name, rate in SYSTEMS.items()}, "baseline", "teacher")
    report = changed(report, samples=[], data__utterances=count)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with open(folder / "utterances.jsonl", "w") as file:
            file.writelines(json.dumps(one) + "\n" for one in made_lines(count))
        began = time.perf_counter()
        packed = pack(partial(read_lines, folder / "utterances.jsonl"), list(SYSTEMS), ["condition"], set(), count)
        page = "".join(render_html(report, packed, Evidence()))
        seconds = time.perf_counter() - began
        (folder / "report.html").write_text(page)
        size = (folder / "report.html").stat().st_size
        figures = open_page(folder) if CHROMIUM else {}
    return {
        "utterances": count, "rows": packed.rows, "written s": round(seconds, 1), "page MB": round(size / 1e6, 2),
        **{f"{key} ms": value and round(value) for key, value in figures.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--utterances", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not CHROMIUM:
        print("no Chromium here: the page is written, not opened", file=sys.stderr)
    print_rows([measure(count) for count in arguments.utterances], arguments.json)


if __name__ == "__main__":
    main()
