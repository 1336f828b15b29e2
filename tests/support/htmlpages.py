"""Looks at pages: whether their tags are closed, and what they ask for."""

from __future__ import annotations

import html.parser


class Page(html.parser.HTMLParser):
    """Collects tags, and complains of those that are not closed."""

    EMPTY = {"meta", "input", "path", "rect", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag
