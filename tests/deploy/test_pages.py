"""The pages that people read: links lead somewhere, and nothing is left to fill in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_PLACEHOLDER = re.compile(r"^[A-Z_]{3,}$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_nothing_is_left_to_fill(page: Path) -> None:
    text = _CODE.sub("", page.read_text())
    local = [(m[1], m[2]) for m in _LINK.finditer(text) if "://" not in m[1]]
    assert [path for path, _ in local if not (page.parent / path).exists()] == []
    parts = [(page.parent / path if path else page, part) for path, part in local if part]
    assert [(path, part) for path, part in parts if part not in headings(path)] == []
    assert _PLACEHOLDER.findall(text) == []


def headings(page: Path) -> set[str]:
    """The names by which links lead to a page's headings, as GitHub makes them."""
    lines = _HEADING.findall(_CODE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}
