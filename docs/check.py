"""Look into the built site: every link within it leads somewhere, and every formula and picture has its source.

python docs/check.py docs/_build/html
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag


class Page(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take in a tag."""
        found = dict(attrs)
        self.links += [link for key in ("href", "src") if (link := found.get(key))]
        self.places |= {place for key in ("id", "name") if (place := found.get(key))}


def broken(site: Path) -> list[str]:
    """Return a line for each link within a site that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    lines = []
    for path, page in pages.items():
        for link in page.links:
            address, place = urldefrag(link)
            if ":" in address.partition("/")[0] or address.startswith("//"):
                continue  # another site, or data
            target = (path.parent / unquote(address.partition("?")[0])).resolve() if address else path
            ok = target.exists() and (target not in pages or not place or unquote(place) in pages[target].places)
            if not ok:
                lines.append(f"{path.relative_to(site.resolve())}: {link}")
    return lines


if __name__ == "__main__":
    found = broken(Path(sys.argv[1]))
    sys.exit("\n".join(["links that lead nowhere:", *found]) if found else 0)
