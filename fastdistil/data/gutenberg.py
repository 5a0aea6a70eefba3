"""Project Gutenberg's headers, footers and licences, taken out of a stream of text that may hold several works.

Fifty years of files have many wordings, and books speak of Project Gutenberg too, so no single line decides. Marks are
looked for near the project's name:

    title       a paragraph that begins as a header does ("The Project Gutenberg Etext of ...")
    start       the line behind a header ("*** START OF THE PROJECT GUTENBERG EBOOK ... ***")
    small end   "*END*THE SMALL PRINT! ...*END*", behind a header until 2002, behind a footer in 2003
    end         the line before a footer ("End of Project Gutenberg's ...", "*** END OF THIS PROJECT GUTENBERG ... ***")
    heading     of the licence ("***START**THE SMALL PRINT!", "START: FULL LICENSE")
    phrase      words that only the header and the licence have

Marks less than GAP characters apart make a run, and a run is judged as one. A header is an opening (title, heading, phrase
or the file's beginning) with its start line; a footer is an end line with licence, a header or the file's end behind it, as
far as its last mark. An end line by itself, with nothing of the licence behind it, is taken out only if it is a paragraph
of the usual form, and nothing else with it. Text between a footer and the next opening is kept.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

GAP = 4000
"""The longest stretch, in characters, without any mark in a header or a footer."""
_FRINGE = 1000
"""Text behind a footer, to the file's end, belongs to it if it is no longer than this."""
_TITLE_CHARACTERS = 200
"""Text before a header, from the file's beginning, belongs to it if it is no longer than this: a title."""
_MARK_CHARACTERS = 400
"""The longest start or end line: a title may run over several lines, to its closing asterisks."""
_CERTAIN_CHARACTERS = 160
"""The longest end line without asterisks that is one by its form alone."""
_CONTEXT = 2 * GAP
"""Characters before a text that say what it is: whether a paragraph begins there, and whether the project's name is near."""
LOOKAHEAD = _MARK_CHARACTERS + 2 * _FRINGE
"""Characters from a mark's beginning that say whether it is one."""
WINDOW = 1 << 16
"""Characters that are gathered before they are judged."""
LONGEST_RUN = 1 << 21
"""A run that grows beyond this is judged as it is, so that memory is bounded."""


class Mark(NamedTuple):
    start: int
    end: int
    kind: Literal["title", "start", "small end", "end", "heading", "phrase"]
    certain: bool = False
    """A paragraph by itself, of the usual form."""
    loose: bool = False
    """An end line without asterisks that does not begin a paragraph."""
    starred: bool = False
    possessive: bool = False
    """A title that prose may begin with too: "Project Gutenberg's ..."."""


class Span(NamedTuple):
    """A stretch of text to take out."""

    start: int
    end: int
    parts: tuple[Literal["header", "footer", "unclosed"], ...]


# One literal each: these are found many times faster than an alternative or letters of either case.
NAMES = [re.compile(name) for name in ("Gutenberg", "GUTENBERG", "gutenberg", "SMALL PRINT", "Small Print", "FULL LICENSE")]

START = re.compile(r"[^\S\n]*\*{2,} ?START OF (?:THE |THIS )?(?:COPYRIGHTED )?PROJECT GUTENBERG\b", re.IGNORECASE)
_SMALL_END = re.compile(
    r"[^\S\n]*\*+ ?END ?\*? ?(?:OF )?THE SMALL PRINT!?(?: ?FOR [A-Z -]+)?(?:\*.*)?[^\S\n]*$", re.IGNORECASE | re.MULTILINE
)
_HEADING = re.compile(
    r"""[^\S\n]*\**[^\S\n]*
    (?:START[ ]?\*+[ ]?THE\ SMALL\ PRINT | The\ Legal\ Small\ Print | START:\ FULL\ LICENSE
    | THE\ FULL\ PROJECT\ GUTENBERG\ LICENSE)""",
    re.IGNORECASE | re.VERBOSE,
)
END = re.compile(
    r"""[^\S\n]*(\*{2,}[^\S\n]*)?(?=(?-i:[A-Z]))
    (?:(?:this\ is\ )?(?:the\ )?end(?:\ of)?|fin\ d[eu]|ende?\ (?:dieses|des|von)|fine\ di|fim\ d[eo]|einde\ van)
    [ ](?:the\ |this\ )?(?:copyrighted\ )?proje[ck]t\ gutenberg\b""",
    re.IGNORECASE | re.VERBOSE,
)
_END_FORM = re.compile(r"['\u2019]s\s+\S|\s+E-?(?:text|book)(?:es)?\b(?:\s+of\b|\s*[,:*#]|\s*$)", re.IGNORECASE | re.MULTILINE)
_TITLE = re.compile(
    r"""[\s*]*(?=(?-i:[A-Z]))(?:this\ is\ )?(?:the\ |a\ )?(?:copyrighted\ )?proje[ck]t\ gutenberg
    (?:(?P<possessive>['\u2019]s)\s+(?!E-?(?:text|book)s\b)\S
    | \s+E-?(?:text|book)(?:,|:|\s+of\b|\s*\#|\s*\*|\s+edition\b|\s*$))""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_PHRASES = (
    (
        r"(?P<opening>Welcome To The World of Free Plain Vanilla Electronic|Copyright laws are changing all over the world"
        r"|This e(?:Book|book|text) is for the use of anyone anywhere)"
    ),
    r"(?:Gutenberg|GUTENBERG)(?:-tm\b|-TM\b|\(tm\)|™)",
    r"Project\s+Gutenberg\s+(?:License|Literary\s+Archive|Association|file\.|at the bottom)",
    r"Project\s+Gutenberg\s+(?:[Ee]-?[Tt]exts|[Ee]-?[Bb]ooks)\b",
    r"Literary\s+Archive\s+Foundation",
    r"\bgutenberg\.(?:org|net)\b",
    r"promo\.net/pg",
    r"\b[Ss]mall [Pp]rint\b",
    r"SMALL PRINT",
    r"Michael S\. Hart",
    r"hart@(?:pobox|vmd)\b",
    r"Illinois Benedictine College",
    r"Carnegie[- ]Mellon University",
    r"\[[Ee]-?(?:[Bb]ook|[Tt]ext):? ?#\d",
    r"Plain Vanilla ASCII",
    r"Both Humans and By Computers",
    r"Prepared By (?:Hundreds|Thousands) of Volunteers",
    r"\b[Tt]his (?:header should be|file should be named)\b",
    r"Updated editions will replace",
    r"VERSIONS based on separate sources",
    r"[Pp]ublic domain\"? (?:e-?text|e-?book|print edition|work)",
    r"BEFORE!\* YOU USE",
    r"\btrademark license\b",
    r"replacement copy in lieu of a refund",
    r"\brefund of the money\b",
    r"LIMITED WARRANTY",
    r"DISCLAIMER OF DAMAGES",
    r"\bINDEMNITY\b",
    r"DISTRIBUTION UNDER",
    r"trillion (?:e-?texts|etexts|ebooks|eBooks|Etexts)",
    r"\bRoyalty payments\b",
    r"\bCharacter set encoding:",
    r"\bRelease [Dd]ate:",
    r"electronic works?\b",
)
_PHRASE = re.compile("|".join(_PHRASES))
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


class GutenbergText:
    """Strips texts, one after the other, and counts over all of them."""

    def __init__(self) -> None:
        self.characters = 0
        self.removed = 0
        """Those of `characters` that were headers, footers and licences."""
        self.half_marked = False
        """Whether a header without its footer, a footer without its header, or licence without either was met."""

    def strip(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield what the works of one text hold; the chunks of `texts` end anywhere, and so do those that come back."""
        work = _Works()
        context, pending, enough = "", "", WINDOW
        for text in texts:
            self.characters += len(text)
            pending += text
            if len(pending) >= enough:
                text = context + pending
                body, decided = self._body(text, len(context), work, final=False)
                context, pending = text[max(decided - _CONTEXT, 0) : decided], text[decided:]
                enough = max(2 * len(pending), WINDOW)
                yield body
        yield self._body(context + pending, len(context), work, final=True)[0]
        self.half_marked |= work.half_marked()

    def _body(self, text: str, begin: int, work: "_Works", final: bool) -> tuple[str, int]:
        """Return what is decided of `text` from `begin` on, stripped, and the position that it is decided up to.

        The text before `begin` was decided before; the text behind the position needs what follows it.
        """
        decided = len(text) if final else max(len(text) - GAP - LOOKAHEAD, begin)
        spans: list[Span] = []
        for run in _runs([mark for mark in find_marks(text) if mark.start >= begin]):
            ends_text = final and len(text) - run[-1].end <= GAP
            if run[-1].end > decided and not final and len(text) - begin < LONGEST_RUN:
                at_beginning = work.at_beginning and run[0].start <= 2 * _FRINGE
                decided = 0 if at_beginning else _line_start(text, min(decided, run[0].start))
                break
            spans += _Run(text, run, work.at_beginning and not spans, ends_text).spans()
        else:
            if not final:
                decided = _line_start(text, decided)
        decided = max(decided, spans[-1].end if spans else begin)
        bodies = []
        at = begin
        for span in [*spans, Span(decided, decided, ())]:
            bodies.append(text[at : span.start])
            work.add(bodies[-1], span)
            self.removed += span.end - max(span.start, at)
            at = span.end
        work.at_beginning &= decided == 0
        return "".join(bodies), decided


class _Works:
    """The check whether each work of a text has a header and a footer."""

    def __init__(self) -> None:
        self.at_beginning = True
        self._marked = False
        self._body_characters = 0
        """Since the last header or footer."""
        self._header_open = False
        self._incomplete = False

    def add(self, body: str, span: Span) -> None:
        """Count the text up to a span, and the span."""
        self._body_characters += len(body.strip())
        for part in span.parts:
            if part == "header":
                self._incomplete |= self._body_characters > (GAP if self._header_open else _FRINGE)
            else:
                self._incomplete |= part == "unclosed" or not self._header_open
            self._header_open, self._marked = part == "header", True
            self._body_characters = 0

    def half_marked(self) -> bool:
        """Tell whether a header lacks its footer, or a footer its header."""
        missing = self._header_open or self._body_characters > _FRINGE
        return self._incomplete or (self._marked and missing)


class _Run:
    """Marks close to each other, and what they say of the text between them."""

    def __init__(self, text: str, marks: list[Mark], begins_text: bool, ends_text: bool) -> None:
        self._text, self._marks = text, marks
        self._begins_text, self._ends_text = begins_text, ends_text
        self._spans: list[Span] = []
        self._opening: list[Mark] = []
        """Marks that a header may begin with, since the last start or end."""
        self._footer: Mark | None = None
        self._footer_end = 0
        self._confirmed = False
        """Whether licence follows the end line."""

    def spans(self) -> list[Span]:
        """Return what to take out, in order."""
        for index, mark in enumerate(self._marks):
            if self._footer is not None:
                self._in_footer(index, mark)
            elif mark.kind == "end":
                self._open_footer(index, mark)
            elif mark.kind == "start" or mark.kind == "small end":
                self._close_header(mark)
            else:
                self._open_header(mark)
        if self._footer is not None:
            if self._ends_text:
                self._confirmed = True
                if self._footer.starred and len(self._text) - self._footer_end <= _FRINGE:
                    self._footer_end = len(self._text)
            self._close_footer()
        self._close_unclosed()
        return self._spans

    def _open_header(self, mark: Mark) -> None:
        """Gather a mark that a header may begin with."""
        if mark.kind == "title" and len(self._opening) == 1 and self._opening[0].kind == "phrase":
            self._opening = []  # a mention, and then the header
        self._opening.append(mark)

    def _close_header(self, mark: Mark) -> None:
        """End a header with its start line."""
        start = self._opening[0].start if self._opening else mark.start
        previous = self._spans[-1] if self._spans else Span(0, -GAP - 1, ())
        titled = any(opening.kind == "title" for opening in self._opening)
        if "header" in previous.parts and not titled and mark.start - previous.end <= GAP:
            self._spans[-1] = previous._replace(end=mark.end)  # two start lines with a transcriber's note between them
        else:
            longest = _TITLE_CHARACTERS if self._opening else 2 * _FRINGE
            near_beginning = self._begins_text and not self._spans and start <= longest
            if self._opening or near_beginning or (mark.certain and mark.kind == "start"):
                self._spans.append(Span(0 if near_beginning else start, mark.end, ("header",)))
        self._opening = []

    def _close_unclosed(self) -> None:
        """Take out a header or licence that no start or end line belongs to, if enough else says that it is one."""
        heads = [mark for mark in self._opening if mark.kind == "heading" or (mark.kind == "title" and not mark.possessive)]
        if heads and len(self._opening) >= 3:
            prose = any(mark.kind == "title" and mark.possessive for mark in self._opening)
            start = heads[0].start if prose else self._opening[0].start
            end = _blank_line(self._text, self._opening[-1].end) or self._opening[-1].end
            self._spans.append(Span(start, end, ("unclosed",)))
        self._opening = []

    def _open_footer(self, index: int, mark: Mark) -> None:
        """Begin a footer with its end line, unless that is a mention."""
        self._close_unclosed()
        if mark.loose:
            following = next(iter(self._marks[index + 1 :]), None)
            before_end = self._ends_text if following is None else following.kind == "end"
            if not before_end or not self._is_blank(mark.end, len(self._text) if following is None else following.start):
                return
        self._footer, self._footer_end, self._confirmed = mark, mark.end, False

    def _in_footer(self, index: int, mark: Mark) -> None:
        """Extend the footer by a mark, or end it where the next work begins."""
        assert self._footer is not None
        # A title begins the next work where a start line follows before any end line.
        following = (other.kind for other in self._marks[index + 1 :] if other.kind in ("start", "small end", "end"))
        if mark.kind == "end":
            if self._is_blank(self._footer_end, mark.start):
                certain, starred = self._footer.certain or mark.certain, self._footer.starred or mark.starred
                self._footer = self._footer._replace(end=mark.end, certain=certain, starred=starred)
                self._footer_end = mark.end
            else:
                self._close_footer()
                self._open_footer(index, mark)
        elif mark.kind == "start":
            if self._confirmed or self._is_blank(self._footer_end, mark.start):
                self._spans.append(Span(self._footer.start, mark.end, ("footer", "header")))
                self._footer = None
            else:
                self._close_footer()
                self._close_header(mark)
        elif mark.kind == "title" and next(following, "end") != "end":
            self._confirmed = True
            self._close_footer()
            self._open_header(mark)
        else:
            self._footer_end = max(self._footer_end, _near_end(self._text, mark.end))
            self._confirmed = True

    def _close_footer(self) -> None:
        """Take the footer out, if licence or its form says that it is one."""
        assert self._footer is not None
        if self._confirmed or self._footer.certain:
            self._spans.append(Span(self._footer.start, self._footer_end, ("footer",)))
        self._footer = None

    def _is_blank(self, start: int, end: int) -> bool:
        return not self._text[start:end].strip()


def _runs(marks: list[Mark]) -> list[list[Mark]]:
    """Return the marks in groups with less than GAP characters between one and the next."""
    groups: list[list[Mark]] = []
    for mark in marks:
        if not groups or mark.start - groups[-1][-1].end > GAP:
            groups.append([])
        groups[-1].append(mark)
    return groups


def find_marks(text: str) -> list[Mark]:
    """Return the marks of a text in order, none within another."""
    names = sorted(match.start() for name in NAMES for match in name.finditer(text))
    marks: list[Mark] = []
    for line in sorted({_line_start(text, name) for name in names}):
        behind_end = bool(marks) and marks[-1].kind in ("end", "small end") and line <= marks[-1].end
        if (mark := _line_mark(text, line, behind_end or _begins_paragraph(text, line))) is not None:
            if behind_end:  # files were joined without a blank line
                marks[-1] = marks[-1]._replace(end=line)
            marks.append(mark)
    for start, end in _near(names):
        marks += [_phrase_mark(text, match) for match in _PHRASE.finditer(text, start, end)]
    marks.sort(key=lambda mark: (mark.start, mark.kind == "phrase"))
    outermost: list[Mark] = []
    for mark in marks:
        if not outermost or mark.start >= outermost[-1].end:
            outermost.append(mark)
    return outermost


def _near(positions: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the stretches less than GAP before or behind any of the positions, which are in order."""
    start = end = 0
    for position in positions:
        if position - GAP > end:
            yield start, end
            start = position - GAP
        end = position + GAP
    yield start, end


def _phrase_mark(text: str, match: re.Match[str]) -> Mark:
    """Return the mark of what PHRASE matches: a title, where that opens a header."""
    start = _line_start(text, match.start())
    # Section 1.E.1 of the licence quotes the sentence on use that headers have, 400 characters behind its number.
    quoted = match[0].startswith("This") and text.find("1.E.1", max(start - 600, 0), start) >= 0
    if match["opening"] and not quoted:
        return Mark(start, match.end(), "title")
    return Mark(match.start(), match.end(), "phrase")


def _line_mark(text: str, start: int, begins: bool) -> Mark | None:
    """Return the mark that the line at `start` is or begins with; `begins`: a paragraph begins there."""
    if match := _SMALL_END.match(text, start):
        return Mark(start, _end_of_line(text, match.end()), "small end")
    if match := START.match(text, start):
        end = _closed_end(text, match.end())
        if end or text[start : _end_of_line(text, start)].isupper():
            return Mark(start, end or _end_of_line(text, start), "start", certain=bool(end and begins))
        return None
    if _HEADING.match(text, start):
        return Mark(start, _end_of_line(text, start), "heading")
    if match := END.match(text, start):
        end = _closed_end(text, match.end()) if match[1] else 0
        if end:
            ends_paragraph = not text[end : _end_of_line(text, end)].strip()  # the next line is blank, or there is none
            return Mark(start, end, "end", certain=begins and ends_paragraph, starred=True)
        end = _paragraph_end(text, match.end())
        if end - start > _MARK_CHARACTERS:
            return None
        form = end - start <= _CERTAIN_CHARACTERS and _END_FORM.match(text, match.end()) is not None
        return Mark(start, end, "end", certain=begins and form, loose=not begins)
    if match := _TITLE.match(text, start):
        return Mark(start, match.end(), "title" if begins else "phrase", possessive=match["possessive"] is not None)
    return None


def _closed_end(text: str, position: int) -> int:
    """Return the end of the line with the asterisks that close a start or end line; 0 for none, or if text follows them."""
    limit = min(_paragraph_end(text, position), position + _MARK_CHARACTERS)
    close = text.find("**", position, limit)
    if close < 0:
        return 0
    end = _end_of_line(text, close)
    return 0 if text[close:end].strip("*\n\r \t") else end


def _line_start(text: str, position: int) -> int:
    """Return where the line begins; `position` itself where that is more than _MARK_CHARACTERS before it."""
    limit = max(position - _MARK_CHARACTERS, 0)
    start = text.rfind("\n", limit, position) + 1
    return start or (position if limit else 0)


def _end_of_line(text: str, position: int) -> int:
    """Return the position behind the line's end."""
    return text.find("\n", position) + 1 or len(text)


def _begins_paragraph(text: str, start: int) -> bool:
    """Tell whether the line before `start` is blank or there is none."""
    before = text[max(start - _MARK_CHARACTERS, 0) : max(start - 1, 0)]
    return not before[before.rfind("\n") + 1 :].strip()


def _blank_line(text: str, position: int) -> int:
    """Return where the paragraph's blank line begins; 0 where none follows soon."""
    match = _BLANK_LINE.search(text, max(position - 1, 0), position + 2 * _FRINGE)
    return match.start() + 1 if match else 0


def _near_end(text: str, position: int) -> int:
    """Return the end of the paragraph, the text or the line, if it is near; `position` itself in a long line."""
    end = _paragraph_end(text, position)
    return end if end - position <= 2 * _FRINGE else position


def _paragraph_end(text: str, position: int) -> int:
    """Return the end of the paragraph; of the line, where a paragraph is as long as a body."""
    end = len(text) if len(text) - position <= 2 * _FRINGE else _end_of_line(text, position)
    return _blank_line(text, position) or end
