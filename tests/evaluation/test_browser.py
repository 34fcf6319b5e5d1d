"""The page's script, run by headless Chromium where there is one (Debian: chromium)."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from asr_kd.evaluation.page import render_html
from asr_kd.evaluation.samples import Evidence
from asr_kd.evaluation.utterances import pack
from tests.evaluation.made import changed, line, report_of, system

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><img src=x onerror='top.hacked = 1'>"
#: what a person does, one step a line; each answers with what is then on the page
DRIVER = """
<iframe id="page" src="report.html" style="width:360px;height:900px"></iframe>
<script>
addEventListener("load", async () => {
  const frame = document.getElementById("page"), page = frame.contentDocument, answers = {};
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  while (!page.documentElement.dataset.ready) await wait(20);
  const $ = (selector) => page.querySelector(selector), all = (selector) => [...page.querySelectorAll(selector)];
  const keys = () => all("#rows tbody th").map((one) => one.firstChild.textContent);
  const state = () => ({ keys: keys().slice(0, 3), rows: keys().length, status: $("#status").textContent,
    sorted: all("#rows thead th").map((one) => one.getAttribute("aria-sort")) });
  const search = async (text) => { $("#search").value = text; $("#search").dispatchEvent(new Event("input")); await wait(300); };
  answers.start = state();
  answers.first = $("#rows .texts").innerText;
  all("#rows thead button")[0].click();
  answers.by_key = state();
  answers.focus = page.activeElement.textContent;
  all(".pages button").find((one) => one.textContent === "Next").click();
  answers.next = state();
  await search("u7 ZERO");
  answers.searched = state();
  await search("no such words");
  answers.nothing = state();
  await search("");
  $("#show").value = "4"; $("#show").dispatchEvent(new Event("change"));
  answers.better = state();
  $("#show").value = "0"; $("#show").dispatchEvent(new Event("change"));
  all("button.find").find((one) => one.textContent.includes("noisy")).click();
  answers.noisy = state();
  $("#chosen button").click();
  await search("hostile");
  answers.hostile = [keys()[0], $("#rows .texts").textContent];
  $("#shown input").click();
  answers.hidden = all("#rows tbody:first-of-type .line").length;
  answers.wide = page.documentElement.scrollWidth;
  answers.images = all("img").length;
  answers.hacked = top.hacked ?? 0;
  const out = document.createElement("pre");
  out.id = "answers"; out.textContent = JSON.stringify(answers);
  document.body.append(out);
});
</script>
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    report = changed(report_of({"base": system(20), "small": system(10)}, baseline="base"), student="small")
    lines = []
    for name in ("base", "small"):
        for index in range(60):
            said = (
                "one two" if name == "base" and index < 3 else "one two three" if index != 5 else "two zero zero nine"
            )
            fields = {"condition": "noisy" if index % 2 else "clean"}
            lines.append(line(name, f"u{index}", "one two three", said, fields=fields))
        lines.append(line(name, HOSTILE, f"hostile {HOSTILE}", "hostile <b>"))
    packed = pack(lambda: lines, list(report.systems), ["condition"], set(), len(lines) // 2)
    (tmp_path / "report.html").write_text("".join(render_html(report, packed, Evidence())))
    (tmp_path / "driver.html").write_text(DRIVER)
    return tmp_path / "driver.html"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_search_sort_filter_and_pages_in_a_browser(page: Path) -> None:
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="answers">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    answers = json.loads(html.unescape(found[1]))
    start = answers["start"]
    assert start["rows"] == 25
    assert start["status"] == "61 of 61 utterances, 1 to 25 shown."
    assert start["keys"][:2] == [HOSTILE, "u5"]  # the student's worst first
    assert start["sorted"] == ["none", "none", "none", "none", "descending", "none"]
    assert "substitution:" in answers["first"]
    assert answers["by_key"]["sorted"][0] == "ascending"
    assert answers["by_key"]["keys"][1:] == ["u0", "u1"]
    assert answers["focus"].startswith("Utterance")
    assert answers["next"]["status"] == "61 of 61 utterances, 26 to 50 shown."
    assert answers["searched"]["status"] == "0 of 61 utterances."
    assert answers["nothing"]["rows"] == 0
    assert answers["better"]["status"].startswith("3 of 61")
    assert answers["noisy"]["status"].startswith("30 of 61")
    assert answers["hostile"][0] == HOSTILE
    assert f"hostile {HOSTILE}" in answers["hostile"][1]
    assert answers["hidden"] == 2
    assert answers["wide"] <= 360
    assert answers["images"] == answers["hacked"] == 0
