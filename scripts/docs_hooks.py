"""Hooks of mkdocs: pages also live in the repository, where they may link to files beside docs/."""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Name such a file instead of linking to it: the site does not hold it."""
    return OUTSIDE.sub(lambda match: f"`{match[2]}`", markdown)
