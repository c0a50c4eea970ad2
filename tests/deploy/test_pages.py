"""The pages that people read: links lead somewhere, and nothing is left to fill in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_PLACEHOLDER = re.compile(r"^[A-Z_]{3,}$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_nothing_is_left_to_fill(page: Path) -> None:
    text = _CODE.sub("", page.read_text())
    local = [m[1] for m in _LINK.finditer(text) if "://" not in m[1]]
    assert [link for link in local if not (page.parent / link).exists()] == []
    assert _PLACEHOLDER.findall(text) == []
