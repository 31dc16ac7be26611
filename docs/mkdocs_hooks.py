"""What the site's build changes in the pages.

A link that leaves docs/ leads to a file that a site does not have. Where mkdocs.yml names the repository (`repo_url`)
it becomes a link into it; else it becomes its text, with the file's place in the repository.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

CODE = re.compile(r"^```.*?^```$|^ {4,}[^\n]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by MkDocs for each page."""
    return outward_links(markdown, posixpath.dirname(page.file.src_uri), config.repo_url)


def outward_links(markdown: str, folder: str, repository: str | None) -> str:
    """The text with its links that leave docs/ changed.

    Args:
        markdown: a page's text.
        folder: the page's folder within docs/, "" for docs/ itself.
        repository: address of the repository, or None.
    """

    def changed(match: re.Match[str]) -> str:
        text, link = match[1], match[2]
        path, hash_, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join("docs", folder, path))
        if target.startswith("docs/"):
            return match[0]
        if repository:
            return f"[{text}]({repository.rstrip('/')}/blob/main/{target}{hash_}{anchor})"
        return text if target in text else f"{text} (`{target}`)"

    pieces, at = [], 0
    for code in CODE.finditer(markdown):
        pieces += [LINK.sub(changed, markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*pieces, LINK.sub(changed, markdown[at:])])
