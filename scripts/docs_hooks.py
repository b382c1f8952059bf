"""Hooks of mkdocs: pages also live in the repository, where they may link to files beside docs/."""

import posixpath
import re
from typing import Any

ABOVE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """Name such a file instead of linking to it: the site does not hold it."""

    def named(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[2]))
        return f"`{target.removeprefix('../')}`" if target.startswith("../") else match[0]

    return ABOVE.sub(named, markdown)
