"""What the tables have in common: rows of a CSV, and a place between two marks of a page."""

from __future__ import annotations

import csv
from pathlib import Path

__all__ = ["read_rows", "write_between"]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_between(page: Path, begin: str, end: str, table: str) -> None:
    """The table into the page, in the place of what stands between the two marks."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
