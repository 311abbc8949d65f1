"""A page of sections with text, tables and pictures, as Markdown and as self-contained HTML."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment

ERROR_LETTERS = 200
MARKDOWN = """\
{% if title %}
# {{ title | line }}
{% endif %}
{% for section in sections %}

## {{ section.title | line }}
{% for picture in section.pictures %}

![{{ captions[picture] | alt }}]({{ picture }})
{% endfor %}
{% for paragraph in section.paragraphs %}

{{ paragraph | line }}
{% endfor %}
{% for code in section.code %}

{{ code | fenced }}
{% endfor %}
{% for link in section.links %}

- [{{ link.label | alt }}]({{ link.name }})
{% endfor %}
{% for table in section.tables %}
{% if table.caption %}

**{{ table.caption | line }}**
{% endif %}

| {{ table.header | map("cell") | join(" | ") }} |
|{{ " --- |" * table.header | length }}
{% for line in table.lines %}
| {{ line | map("cell") | join(" | ") }} |
{% endfor %}
{% endfor %}
{% endfor %}
"""

HTML = """\
<!DOCTYPE html>
<html lang="en-GB">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { font-weight: 600; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
th { background: #f5f5f5; }
td { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}<section>
<h2>{{ section.title }}</h2>
{% for picture in section.pictures %}\
<figure><img alt="{{ captions[picture] }}" src="data:image/png;base64,{{ images[picture] }}"></figure>
{% endfor %}{% for paragraph in section.paragraphs %}<p>{{ paragraph }}</p>
{% endfor %}{% for code in section.code %}<pre><code>{{ code.text }}</code></pre>
{% endfor %}{% for link in section.links %}<p><a href="{{ link.name }}">{{ link.label }}</a></p>
{% endfor %}{% for table in section.tables %}<div class="wide"><table>
{% if table.caption %}<caption>{{ table.caption }}</caption>
{% endif %}<thead><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for line in table.lines %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}</section>
{% endfor %}</body>
</html>
"""

MARKUP = re.compile(
    r"[\\`*|~$@]|\](?=[(\[:])|&(?=#?\w+;)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[A-Za-z]):(?=//)|(?<=www)\.",
    re.IGNORECASE,
)
"""Characters with a meaning in GitHub's Markdown, including those of addresses that it links automatically."""
IN_BRACKETS = re.compile(rf"{MARKUP.pattern}|[\[\]]", re.IGNORECASE)
"""The same in a picture's alternative text, which is written in brackets."""
BEGINNING = re.compile(r"^(\d{0,9})([#>=+.)-])")
"""Beginning of a line that Markdown would read as a heading, a quotation or a list."""


@dataclass(frozen=True)
class Table:
    """A table of plain text; every line has as many cells as the header."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Link:
    """A file beside the page, by a name without markup, and the text to click."""

    label: str
    name: str


@dataclass(frozen=True)
class Code:
    """A block of code."""

    language: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading with pictures (names of PNG files), paragraphs of plain text, code, links and tables below it."""

    title: str
    pictures: Sequence[str] = ()
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    links: Sequence[Link] = ()
    code: Sequence[Code] = ()


def markdown(title: str, sections: Sequence[Section], captions: Mapping[str, str] = {}) -> str:
    """Render the page as Markdown; pictures are linked. Without a title, the sections alone.

    ``captions``: picture -> alternative text.
    """
    environment = Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"cell": _cell, "line": _line, "alt": _alt, "fenced": _fenced}
    return environment.from_string(MARKDOWN).render(title=title, sections=sections, captions=captions)


def html(title: str, sections: Sequence[Section], captions: Mapping[str, str], pictures: Mapping[str, bytes]) -> str:
    """Render the page as HTML that embeds the pictures (name -> PNG) and loads nothing."""
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    images = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    return environment.from_string(HTML).render(title=title, sections=sections, captions=captions, images=images)


def _cell(text: str, marks: re.Pattern[str] = MARKUP) -> str:
    """Escape text for one line of Markdown: no markup, link, formula, tag, or end of a cell."""
    return marks.sub(r"\\\g<0>", " ".join(text.split())).replace("<", "&lt;")


def _line(text: str) -> str:
    return BEGINNING.sub(r"\1\\\2", _cell(text))


def _alt(text: str) -> str:
    return _cell(text, IN_BRACKETS)


def _fenced(code: Code) -> str:
    """Code between fences that are longer than any row of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code.text)), default=0))
    return f"{fence}{code.language}\n{code.text.strip()}\n{fence}"


def shorten(error: str | None) -> str:
    """An error shortened for a cell; cases.csv has the whole text."""
    return (error or "")[:ERROR_LETTERS] + " ..." * (len(error or "") > ERROR_LETTERS)
