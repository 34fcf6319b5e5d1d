from __future__ import annotations

from asr_kd.evaluation.schema import FORMAT, VERSION, Report
from tests.evaluation.made import distilled


def test_every_key_is_described() -> None:
    schema = Report.model_json_schema()
    ours = [
        schema,
        *(one for one in schema["$defs"].values() if "properties" in one and not one["title"].endswith("Settings")),
    ]
    for group in ours:
        for key, one in group["properties"].items():
            assert one.get("description"), f"{group['title']}.{key}"


def test_a_report_is_of_this_version_and_survives_json() -> None:
    report = distilled(20, 10, 12)
    assert (report.format, report.version) == (FORMAT, VERSION)
    assert Report.model_validate_json(report.model_dump_json()) == report
