"""Links of the documentation lead to files that are there, and to headings that these have."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: small letters, no punctuation, hyphens for blanks, a number to repeat one."""
    found: dict[str, int] = {}
    made = set()
    for title in HEADING.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        made.add(name if name not in found else f"{name}-{found[name]}")
        found[name] = found.get(name, 0) + 1
    return made


def broken(page: Path) -> list[str]:
    wrong = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n## Two `of` them\n## One\n[a](page.md#one-1) [b](#two-of-them) `[c](none.md)`\n")
    assert broken(page) == []
    page.write_text("# One\n[a](none.md) [b](#two) [c](page.md#one) [d](https://example.com/none)\n")
    assert broken(page) == ["none.md", "#two"]
