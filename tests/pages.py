"""What tests ask of a report's page: its words as a parser reads them, and how it stands in a browser."""

import html.parser
from pathlib import Path


class Page(html.parser.HTMLParser):
    """Elements, their attributes' names and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.words = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.words.append(data)


def check_in_browser(browser, path: Path, width: int, scheme: str, figures: set[str]) -> None:
    """The page asks for nothing, says nothing, overflows nowhere and shows these figures readably, at this width."""
    page, troubles, requests = browser.new_page(), [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert page.evaluate(f"{beyond}.map(e => e.outerHTML.slice(0, 90))") == []
    sizes = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-figure]')].map(e => [e, e.getBoundingClientRect()])"
        ".filter(([e, r]) => r.width > 0).map(([e, r]) => [e.dataset.figure, [r.width, r.height, e.ariaLabel]]))"
    )
    assert set(sizes) == figures
    for figure_width, height, label in sizes.values():
        assert figure_width > 0.6 * min(width, 900)
        assert height > 40
        assert label
    # Text of the figures, as drawn at this width, in CSS pixels.
    heights = page.evaluate(
        "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height).filter(h => h > 0)"
    )
    assert min(heights) >= 9
    ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    luminance = [sum(int(part) for part in colour[4:-1].split(",")) / 3 for colour in (ink, paper)]
    assert (luminance[0] > luminance[1] + 150) if scheme == "dark" else (luminance[1] > luminance[0] + 150)
    assert page.evaluate("window.hacked === undefined")
    assert troubles == []
    assert requests == [path.as_uri()]
    page.close()
