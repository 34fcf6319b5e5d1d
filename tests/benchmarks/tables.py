"""How every benchmark prints its rows: a Markdown table, or with --json an object a row."""

from __future__ import annotations

import json
from typing import Any


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows that have the same columns."""
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join("–" if value is None else str(value) for value in row.values()) + " |")
