"""The README and docs/ as tests read them: pages, headings, links, blocks of code."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: the language after its first fence, its text, and the line where it stands."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in their order."""
    return [Block(m[1], m[2], page[: m.start()].count("\n") + 2) for m in _FENCE.finditer(page)]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page)


def anchors(page: str) -> set[str]:
    """The anchors that a renderer gives to a page's headings: lower case, words joined by dashes."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


def broken_links(path: Path, root: Path) -> list[str]:
    """The relative links of a page that lead to no file under `root`, or to no heading of a page."""
    page, broken = path.read_text(), []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        is_there = file.is_file() and file.is_relative_to(root)
        if not is_there or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken
