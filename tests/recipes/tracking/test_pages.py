"""Pages of studies: sections, what is left out, escaping."""

from __future__ import annotations

from pathlib import Path

from recipes.tracking.report.formats import aligned
from recipes.tracking.report.page import Picture, Section, write_study


def test_a_page_has_its_sections_in_order(tmp_path: Path) -> None:
    picture = Picture(b"light", b"dark", 'a "figure"')
    sections = [
        Section("First", bullets=["<b>one</b>"], picture=picture),
        Section(
            "Second", head=("name", "value"), rows=[["x", "-"], ["y", "2"]], notes=["a note"], absent="-"
        ),
        Section(facts=[("key", "<i>")]),
    ]
    text = write_study(tmp_path / "page.html", "A & B", ["said first"], sections).read_text()
    places = [text.index(part) for part in ("A &amp; B", "said first", "First", "Second", "a note", "key")]
    assert places == sorted(places)
    assert "&lt;b&gt;one&lt;/b&gt;" in text and "<i>" not in text and "a &#34;figure&#34;" in text
    assert '<td class="none">-</td>' in text and "<td>2</td>" in text
    assert text.count("data:image/png;base64,") == 2 and "http" not in text.replace("http-equiv", "")


def test_what_is_empty_is_left_out(tmp_path: Path) -> None:
    text = write_study(tmp_path / "page.html", "Nothing", [], [Section(), Section(head=("a",))]).read_text()
    body = text.partition("<body>")[2]
    assert not any(tag in body for tag in ("<h2>", "<table", "<figure", "<ul>", "<p"))


def test_tables_of_the_terminal_are_aligned() -> None:
    rows = [["a", "1", "2.0"], ["long name", "10", "3"]]
    lines = aligned(("name", "n", "value"), rows).splitlines()
    assert lines[0] == "name        n  value" and lines[1] == "-" * len(lines[0])
    assert lines[3] == "long name  10      3"
