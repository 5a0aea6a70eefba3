"""Project Gutenberg's headers and footers of fifty years are taken out, and nothing else is."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data import gutenberg
from fastdistil.data.gutenberg import GutenbergText, find_marks

STORY = "\n\n".join(f"Chapter {n}.\n\nIt was the {n}th day, and nobody had yet come down the hill." for n in range(30))

WELCOME = """**Welcome To The World of Free Plain Vanilla Electronic Texts**

**Etexts Readable By Both Humans and By Computers, Since 1971**

Information on contacting Project Gutenberg to get Etexts is below.
We need your donations.
"""
SMALL_PRINT = """***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***
Why is this "Small Print!" statement here?  Lawyers, as you know.

*BEFORE!* YOU USE OR READ THIS ETEXT
You accept it by reading this PROJECT GUTENBERG-tm etext.

LIMITED WARRANTY; DISCLAIMER OF DAMAGES
You can receive a refund of the money (if any) that you paid.
""" + "\n".join(f"[{n}]  Line {n} of the legal part, in which no word is rare.\n" for n in range(20))
USE = """This eBook is for the use of anyone anywhere at no cost and with
almost no restrictions whatsoever, under the Project Gutenberg License.

Title: A Story

Release Date: May, 1998 [EBook #1234]

Character set encoding: ASCII
"""
LICENCE = """Updated editions will replace the previous one.

*** START: FULL LICENSE ***

THE FULL PROJECT GUTENBERG LICENSE

1.A.  By reading any part of this Project Gutenberg-tm electronic work, you agree.

1.E.1.  The following sentence must appear:

This eBook is for the use of anyone anywhere at no cost

1.F.  The Project Gutenberg Literary Archive Foundation owns the compilation.
"""
SMALL_PRINT_END = "\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*Ver.02/11/02*END*\n"

HEADERS = {
    "1993": f"***The Project Gutenberg Etext of A Story***\n\n{WELCOME}\n{SMALL_PRINT}\n"
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n",
    "1997": f"Project Gutenberg's A Story, by Somebody\n\n{WELCOME}\n{SMALL_PRINT}\n"
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.07.02.92*END*\n",
    "2001": f"The Project Gutenberg Etext of A Story by Somebody\n#2 in our series\n\nCopyright laws are changing all over the "
    f"world.\n\n{WELCOME}\n{SMALL_PRINT}\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.10/04/01*END*\n",
    "2002": "The Project Gutenberg EBook of A Story\n\nThis header should be the first thing seen when viewing this Project\n"
    "Gutenberg file.\n\nRelease Date: 2002\n\n*** START OF THE PROJECT GUTENBERG ETEXT A STORY ***\n",
    "2003": f"Project Gutenberg's A Story, by Somebody\n\n{USE}\n*** START OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n",
    "2006": f"The Project Gutenberg eBook, A Story, by Somebody\n\n{USE}\n"
    "***START OF THE PROJECT GUTENBERG EBOOK A STORY, WITH A LONG\nTITLE***\n",
    "2021": f"The Project Gutenberg eBook of A Story\n\n{USE}\n*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n",
}
FOOTERS = {
    "1993": "End of The Project Gutenberg Etext of A Story\n",
    "1995": "END OF PROJECT GUTENBERG ETEXT OF A STORY\n",
    "1997": "End of Project Gutenberg's Etext of A Story, by Somebody\n",
    "1998": "The End of the Project Gutenberg Etext of A Story by\nSomebody\n",
    "1994": "End of The Project Gutenberg Etext\n",
    "1999": "End of this Project Gutenberg Etext of A Story.\n",
    "2000": "THE END OF THE PROJECT GUTENBERG EBOOK, A STORY\n",
    "2001": "End of The Project Gutenberg eText of A Story, by Somebody***\n",
    "2002": "*** END OF PROJECT GUTENBERG'S A STORY ***\n",
    "2003": "End of the Project Gutenberg EBook of A Story\n\n*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\n"
    f"This file should be named story10.txt\n\nProject Gutenberg eBooks are often created\nfrom several.\n\n{SMALL_PRINT}"
    + SMALL_PRINT_END,
    "2006": f"***END OF THE PROJECT GUTENBERG EBOOK A STORY***\n\n\n**** This file should be named 1.txt ****\n\n{LICENCE}",
    "2010": "End of Project Gutenberg\u2019s A Story, by Somebody\n\n*** END OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\n"
    f"***** This file should be named 1-0.txt or 1-0.zip *****\n\n{LICENCE}",
    "2021": f"*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\n{LICENCE}",
}


def stripped(text: str, size: int = 1 << 20) -> tuple[str, GutenbergText]:
    stripper = GutenbergText()
    return "".join(stripper.strip(text[at : at + size] for at in range(0, len(text), size))), stripper


@pytest.mark.parametrize("footer", FOOTERS)
@pytest.mark.parametrize("header", HEADERS)
def test_historic_wordings(header: str, footer: str) -> None:
    book = f"{HEADERS[header]}\n\n\n{STORY}\n\n\n\n{FOOTERS[footer]}"
    body, stripper = stripped(book)
    assert body.strip() == STORY
    assert not stripper.half_marked
    assert (stripper.characters, stripper.removed) == (len(book), len(book) - len(body))


@pytest.mark.parametrize("footer", FOOTERS)
@pytest.mark.parametrize("between", ["", "A poem of one line.", "\n\n".join(["A poem", "of some stanzas"] * 40), STORY * 3])
def test_nothing_between_a_footer_and_the_next_header_is_lost(footer: str, between: str) -> None:
    text = f"{HEADERS['1993']}\n{STORY}\n\n{FOOTERS[footer]}\n\n{between}\n\n{HEADERS['2001']}\nSecond.\n\n{FOOTERS['1998']}"
    body, stripper = stripped(text)
    assert "".join(body.split()) == "".join(f"{STORY}{between}Second.".split())
    assert stripper.half_marked is (len(between) > 1000)


@pytest.mark.parametrize("footer", FOOTERS)
@pytest.mark.parametrize("header", HEADERS)
def test_files_joined_without_a_blank_line(header: str, footer: str) -> None:
    body, _ = stripped(f"{HEADERS[header]}\n{STORY}\n\n{FOOTERS[footer].strip()}\n" * 3)
    assert "".join(body.split()) == "".join((STORY * 3).split())


@pytest.mark.parametrize("footer", FOOTERS)
def test_works_behind_a_single_header(footer: str) -> None:
    """As in collections of the 1990s: each work has its footer, only the first a header."""
    works = [STORY.replace("hill", place) for place in ("stairs", "road", "river")]
    text = HEADERS["1997"] + "".join(f"\n\n{work}\n\n\n{FOOTERS[footer]}\n\n" for work in works)
    body, stripper = stripped(text)
    assert "".join(body.split()) == "".join("".join(works).split())
    assert stripper.half_marked


MENTIONS = (
    "He had read as far as the line *** END OF THE PROJECT GUTENBERG EBOOK EMMA *** and went on.",
    "A line like\n*** END OF THIS PROJECT GUTENBERG EBOOK EMMA ***\nis what every such file has, and then",
    "We had come to the\nend of the Project Gutenberg Etext of Emma, and were sad.",
    "The End of the Project Gutenberg Etext was a sad day for all of us.",
    f"End of Project Gutenberg's beginnings, one could say of that year, {'and of the one before it, ' * 5}and of no other.",
    "*END*THE SMALL PRINT! is what the header ended with.",
    "*** START OF THE PROJECT GUTENBERG EBOOK is what a header ends with, they said.",
    "The Project Gutenberg Etext of Emma is the one that we used.",
    "Project Gutenberg's Emma, by Jane Austen, is at www.gutenberg.org.",
    "***START**THE SMALL PRINT! was the title of a chapter.",
)


@pytest.mark.parametrize("mention", MENTIONS)
def test_a_mention_ends_no_text(mention: str) -> None:
    text = f"{STORY * 4}\n\n{mention}\n\n{STORY * 4}\n"
    assert stripped(text)[0] == text
    for body in (f"{mention}\n\n{STORY * 4}", f"{STORY * 4}\n\n{mention}\n\n{STORY}", f"{STORY}\n\n{mention} {STORY}"):
        book = f"{HEADERS['2003']}\n\n{body}\n\n\n{FOOTERS['2010']}"
        assert stripped(book)[0].strip() == body


@pytest.mark.parametrize("before", ["We had come to the\n", "It was said, " * 40])
def test_no_chunk_changes_what_is_stripped(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever line or word the text is cut at, a mention in the middle of a paragraph stays one."""
    monkeypatch.setattr(gutenberg, "WINDOW", 1000)
    paragraph = "We had come to the road, and far beyond the hill lay all of the valley.\n" * 40
    text = f"{paragraph}{before}End of the Project Gutenberg Etext of Emma\n\n{paragraph * 5}"
    assert stripped(text)[0] == text
    for decided in range(len(paragraph), len(paragraph + before) + 100):
        end = decided + gutenberg.GAP + gutenberg.LOOKAHEAD
        assert "".join(GutenbergText().strip([text[:end], text[end:]])) == text, end


def test_no_chunk_gives_back_the_end_of_a_footer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last paragraph may go on behind the place that the text is cut at, because of another mark further on."""
    monkeypatch.setattr(gutenberg, "WINDOW", 1000)
    book = f"{HEADERS['2021']}\n{STORY}\n\n{FOOTERS['2021']}"
    text = f"{book}{'and so on, ' * 150}\n\n{STORY * 4}\nProject Gutenberg's Emma.\n\n{STORY * 4}"
    expected = stripped(text)[0]
    assert "and so on" not in expected
    for decided in range(len(book) - 100, len(book) + 1700, 10):
        end = decided + gutenberg.GAP + gutenberg.LOOKAHEAD
        assert "".join(GutenbergText().strip([text[:end], text[end:]])) == expected, end


def test_half_marked_files_are_told() -> None:
    for text in (
        f"{HEADERS['1993']}\n{STORY}",
        f"{STORY}\n\n{FOOTERS['2021']}",
        f"{HEADERS['2021'].split('*** START')[0]}\n\n\n{STORY}\n\n{FOOTERS['2021']}",
    ):
        body, stripper = stripped(text)
        assert body.strip() == STORY
        assert stripper.half_marked
    assert stripped(STORY)[1].half_marked is False


def test_licence_without_any_end_line() -> None:
    body, stripper = stripped(f"{HEADERS['2021']}\n{STORY}\n\n{LICENCE}")
    assert "1.A" not in body
    assert stripper.half_marked


def test_prose_about_the_project_is_kept() -> None:
    text = (
        "Project Gutenberg's aim, said its founder, was to give books away. Michael S. Hart typed the first himself.\n\n"
        f"{STORY[:1500]}\n\nToday the site gutenberg.org has many, and Project Gutenberg eBooks are read everywhere.\n"
    )
    assert stripped(text)[0] == text
    assert stripped(text + STORY)[0] == text + STORY
    body, _ = stripped(f"{text}\n{HEADERS['1993'].split('*END*')[0]}")
    assert body.startswith(text)


LONG_LINE = "It was read aloud, and all of them listened. " * 2000


def test_a_header_without_end_on_one_line_takes_no_book_with_it() -> None:
    header = " ".join(HEADERS["2021"].split())
    for size in (1 << 20, 1000):
        body, stripper = stripped(f"{header} {LONG_LINE}", size)
        assert body.endswith(LONG_LINE)
        assert stripper.half_marked
        body, _ = stripped(f"{STORY}\n\n{FOOTERS['1998']}\n{' '.join(LICENCE.split())} {LONG_LINE}", size)
        assert body.endswith(LONG_LINE)
        assert "1.A" not in body


def test_counts_are_of_all_texts() -> None:
    stripper = GutenbergText()
    for _ in range(3):
        assert "".join(stripper.strip([HEADERS["1993"], "body\n\n", FOOTERS["1993"]])).strip() == "body"
    assert not stripper.half_marked
    assert stripper.characters - stripper.removed >= 3 * len("body")


def test_a_run_of_marks_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gutenberg, "WINDOW", 2000)
    monkeypatch.setattr(gutenberg, "LONGEST_RUN", 10_000)
    text = "The text speaks of the Project Gutenberg License in every line.\n" * 3000
    longest = 0
    stripper = GutenbergText()
    fed = received = 0

    def chunks() -> object:
        nonlocal fed, longest
        for at in range(0, len(text), 1000):
            fed += len(text[at : at + 1000])
            yield text[at : at + 1000]
            longest = max(longest, fed - received)

    for part in stripper.strip(chunks()):  # type: ignore[arg-type]
        received += len(part)
    assert received == len(text)
    assert longest < 30_000


def test_a_mark_in_a_long_line_begins_where_it_stands() -> None:
    """No line's start is looked for over megabytes, from every mark, and no header begins at one."""
    text = f"{'It was read aloud. ' * 200}This eBook is for the use of anyone anywhere under the Project Gutenberg License."
    assert find_marks(text)[0].start == text.index("This eBook")


WORDS = [
    "the",
    "end",
    "of",
    "project",
    "small",
    "print",
    "***",
    "START",
    "END",
    "Gutenberg",
    "license",
    "1.E.1",
    "\u00e9t\u00e9",
]
# A paragraph of an end line's own form, right before a footer, is that footer's: no rule could tell them apart.
END_LINE = re.compile(r"(?:the )?end (?:of )?(?:the )?project gutenberg", re.IGNORECASE)
PARAGRAPHS = (
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join).filter(lambda text: not END_LINE.match(text))
)
BODIES = st.builds(
    lambda texts, times: "\n\n".join(texts * times), st.lists(PARAGRAPHS, min_size=1, max_size=6), st.integers(1, 100)
)
WORKS = st.tuples(st.sampled_from(sorted(HEADERS)), BODIES, st.sampled_from(sorted(FOOTERS)), st.integers(1, 5))


@settings(max_examples=100)
@given(st.lists(WORKS, min_size=1, max_size=4), st.integers(100, 5000), st.integers(0, 2**16))
def test_bodies_come_out_as_they_went_in(works: list[tuple[str, str, str, int]], size: int, window: int) -> None:
    """Whatever the headers, footers, bodies and chunks."""
    text = "".join(
        f"{HEADERS[header]}{chr(10) * blank}{body}{chr(10) * (blank + 1)}{FOOTERS[footer]}{chr(10) * blank}"
        for header, body, footer, blank in works
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gutenberg, "WINDOW", window)
        body, stripper = stripped(text, size)
    assert "".join(body.split()) == "".join("".join(work[1] for work in works).split())
    assert not stripper.half_marked
