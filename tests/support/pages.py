"""What the tests of the documentation share: its pages, their fenced blocks, and the commands that they show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = (
    *("loscar", "python", "python3", "make", "pip", "docker", "docker-compose", "kubectl", "sbatch", "systemctl"),
    *("tc", "modprobe", "ip", "iptables", "install", "openssl", "export", "sudo", "mkdir", "tail", "journalctl"),
)
INDENTED = re.compile(rf"^ {{4}}((?:\S*/)?(?:{'|'.join(PROGRAMS)}) .*(?:\\\n.*)*)$", re.MULTILINE)
"""Commands in an indented block. Equations and messages are such blocks too, so it is the programs that tell."""


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """(language, body) of a page's fenced blocks."""
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield match[1], match[2]


def shown_commands(page: Path) -> list[str]:
    """The commands of a page in its order, each in one line: after `$ ` in console blocks, and indented ones.

    The `&` of a command in the background is left out, and so is a comment.
    """
    found = []
    for language, body in fences(page):
        if language == "console":
            found += [line[2:] for line in joined(body).splitlines() if line.startswith("$ ")]
    found += [joined(match) for match in INDENTED.findall(FENCE.sub("", page.read_text(encoding="utf-8")))]
    return [re.sub(r"\s+#.*$", "", line).strip().removesuffix("&").strip() for line in found]


def joined(text: str) -> str:
    """Without the line breaks that a backslash continues."""
    return re.sub(r" *\\\n *", " ", text)
