"""Where a call in tags ends. Values may hold any mark, so several places may look like the end.

The right one explains the rest of the answer best. Every way to read the text has a cost, and the least one wins:

- a closing mark that is left over in the text between calls costs 2 (a value that was taken to end too early);
- a mark within a value that has no partner there costs 1 (a value that was taken to end too late), and so does an
  opening one in the text;
- a call in a sentence or in a code fence costs 1 if it is no call;
- a mark that is not on a line of its own, where the call's others are, costs 3;
- a missing mark costs 3, and so does a new parameter's mark, without an end before it, that is taken for text;
- the end of a value with a new parameter of the schema after it costs 5 if it is taken for text, and so does the end
  of a call with another call after it.

Among ways of equal cost, the one that ends values first wins. So a value that quotes whole calls, or a single
mark, is whole. One thing cannot be told apart: a value that holds closing marks and then a whole call reads, byte for
byte, like two calls, and is read so.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from mlx_flashmoe.tools.marks import Mark, TagMarks

LEFT_OVER, ALONE, CRAMMED, MISSING, PASSED, PROSE, UNREAD = 2, 1, 3, 3, 5, 1, 1000


class Partners:
    """Counts the marks of a value that have no partner within it."""

    def __init__(self) -> None:
        self.open: Counter[str] = Counter()
        self.closed = 0

    def copy(self) -> Partners:
        other = Partners()
        other.open, other.closed = self.open.copy(), self.closed
        return other

    def add(self, kind: str) -> bool:
        """Takes one more mark. False if it closes something that was not opened."""
        if not kind.startswith("/"):
            self.open[kind] += 1
        elif self.open[kind[1:]]:
            self.open[kind[1:]] -= 1
        else:
            self.closed += 1
            return False
        return True

    @property
    def alone(self) -> int:
        return sum(self.open.values()) + self.closed

    @property
    def quoting(self) -> bool:
        """A call has been opened within the value, its parameter too: what closes now may be theirs."""
        return self.open["function"] > 0 and self.open["parameter"] > 0


@dataclass(frozen=True)
class Plan:
    """How to read a call: the value that was begun ends at ``ends[0]``, the next parameter's at ``ends[1]`` …

    Attributes:
        parameters: the marks of the parameters that follow the one that was begun.
        ends: the place where each value ends, one more than ``parameters``; none if there are no parameters.
        end: the end of the call.
    """

    parameters: list[Mark]
    ends: list[int]
    end: int


@dataclass
class Region:
    """Text that begins within a call, and may reach beyond its end.

    Attributes:
        marks: those in ``text`` that are not settled, in order.
        partners: of the begun value's marks so far; None if only the function's mark has been read.
        keys: the parameters given so far, the begun one included.
        properties: the parameters that the schema knows.
        names: of the functions that may be called.
        last: the answer ends with the text. Else another call follows it.
        alone: no text stands before the call on its line.
        fenced: the call stands in a code fence that was open before it.
        before: the character before the text.
        filled: the begun value has text before this text.
        lines: the call has its marks on lines of their own so far.
    """

    form: TagMarks
    text: str
    marks: Sequence[Mark]
    partners: Partners | None
    keys: frozenset[str]
    properties: Collection[str]
    names: Collection[str]
    last: bool
    alone: bool = True
    fenced: bool = False
    lines: bool = False
    before: str = "\n"
    filled: bool = False


@dataclass(frozen=True)
class _State:
    kind: str  # "value", "text" or "end"
    place: int = 0  # the next mark
    keys: frozenset[str] = frozenset()
    first: bool = False  # the call is the region's own


@dataclass(order=True)
class _Way:
    cost: int
    choices: tuple[int, ...]
    state: _State = field(compare=False)
    own: tuple[tuple[Mark | None, int], ...] = field(compare=False, default=())
    end: int = field(compare=False, default=-1)


def choose(region: Region) -> Plan | None:
    """The best way to read the call; None if it has no end here."""
    return _Search(region).run()


class _Search:
    def __init__(self, region: Region) -> None:
        self.r = region
        self.ways: list[_Way] = []
        self.seen: set[_State] = set()

    def run(self) -> Plan | None:
        r = self.r
        first = _Way(0, (), _State("value", 0, r.keys, True))
        if r.partners is None:
            self._inside(first, 0)
        else:
            heapq.heappush(self.ways, first)
        heapq.heappush(self.ways, _Way(UNREAD, (len(r.marks) + 1,), _State("end")))
        if not r.alone or r.fenced:
            heapq.heappush(self.ways, _Way(PROSE, (), _State("text")))
        while self.ways:
            way = heapq.heappop(self.ways)
            if way.state in self.seen:
                continue
            self.seen.add(way.state)
            if way.state.kind == "end":
                if way.end < 0:
                    return None
                marks = [m for m, _ in way.own if m is not None]
                return Plan(marks, [end for _, end in way.own], way.end)
            (self._value if way.state.kind == "value" else self._text)(way)
        return None

    def _push(self, way: _Way, cost: int, choice: int, state: _State, **more: object) -> None:
        own = more.get("own", way.own)
        end = more.get("end", way.end)
        heapq.heappush(
            self.ways,
            _Way(way.cost + cost, (*way.choices, choice), state, own, end),  # type: ignore[arg-type]
        )

    def _next(self, place: int) -> str:
        """The kind of the mark that follows mark ``place``, with only white space between; "" if none does."""
        marks = self.r.marks
        if place + 1 >= len(marks):
            return ""
        between = self.r.text[marks[place].end : marks[place + 1].start]
        return marks[place + 1].kind if not between or between.isspace() else ""

    def _inside(self, way: _Way, place: int) -> None:
        """After the function's mark: ``place`` is the mark that follows it."""
        marks, first = self.r.marks, way.state.first
        if place >= len(marks):
            return
        kind = marks[place].kind
        if kind == "parameter":
            own = (*way.own, (marks[place], -1)) if first else way.own
            state = _State("value", place + 1, frozenset([marks[place].name]), first)
            self._push(way, 0, place, state, own=own)
        elif kind == "/function":
            self._function_end(way, place, 0, None)
        elif kind == "/section" and self.r.last:
            self._end(way, place, MISSING, None, strict=False)

    def _value(self, way: _Way) -> None:
        r, state = self.r, way.state
        own_value = state.first and state.place == 0 and r.partners is not None
        partners = r.partners.copy() if own_value and r.partners else Partners()
        passed, quoted, names = 0, 0, set(state.keys)  # a value may quote many calls: that costs once
        for q in range(state.place, len(r.marks)):
            mark, after = r.marks[q], self._next(q)
            cost = partners.alone * ALONE + passed + quoted
            before = r.marks[q - 1].kind if q > state.place and self._next(q - 1) else ""
            if mark.kind == "/parameter" and after == "parameter":
                name = r.marks[q + 1].name
                if name not in state.keys:
                    crammed = self._crammed(q, q + 1)
                    self._parameter(way, q + 1, mark.start, cost + crammed + (name not in r.properties))
                    passed += PASSED * (name in r.properties and name not in names and not crammed)
                    names.add(name)
            elif mark.kind == "/parameter" and after == "/function":
                last = q + 2 if self._next(q + 1) == "/section" else q + 1
                crammed = self._crammed(q, last)
                self._function_end(way, q + 1, cost + crammed, mark.start, partners.quoting)
                again = last + 1 < len(r.marks) and opens(r, last + 1) is not None
                if again and not crammed:
                    quoted, passed = (PASSED, passed) if partners.quoting else (quoted, passed + PASSED)
            elif mark.kind == "parameter" and before != "/parameter" and not any(partners.open.values()):
                begin = r.marks[q - 1].end if q else 0
                text_before = q > state.place or bool(r.text[begin : mark.start].strip())
                filled = text_before or (own_value and r.filled)
                new = mark.name in r.properties and mark.name not in state.keys
                if new and filled and on_line(r.text, mark, r.before):
                    self._parameter(way, q, mark.start, cost + MISSING)
                    passed += MISSING
            elif (
                r.last
                and mark.kind in ("/function", "/section")
                and before not in ("/parameter", "/function")
            ):
                # Nothing but a parameter's or a section's end may be missing before the answer has ended.
                passed += self._lenient_end(way, q, cost, mark.start, partners)
            elif r.last and mark.kind == "/parameter" and after == "/section":
                self._end(way, q + 1, cost + MISSING, mark.start, strict=False)
            partners.add(mark.kind)

    def _lenient_end(self, way: _Way, place: int, cost: int, value_end: int, partners: Partners) -> int:
        """The call may end at a mark without the value's end before it. Returns the cost if it does not."""
        kind = self.r.marks[place].kind
        if kind == "/function":
            self._function_end(way, place, cost + MISSING, value_end, strict=False)
            place += self._next(place) == "/section"
        else:
            self._end(way, place, cost + 2 * MISSING, value_end, strict=False)
        again = place + 1 < len(self.r.marks) and opens(self.r, place + 1) is not None
        return MISSING if again and not partners.open[kind[1:]] else 0

    def _crammed(self, first: int, last: int) -> int:
        """The cost of marks that are not on lines of their own."""
        marks = self.r.marks[first : last + 1]
        return CRAMMED * (
            self.r.lines and not all(on_line(self.r.text, mark, self.r.before) for mark in marks)
        )

    def _parameter(self, way: _Way, place: int, value_end: int, cost: int) -> None:
        """The value ends, and the parameter at ``place`` begins."""
        mark, state = self.r.marks[place], way.state
        own = (*way.own[:-1], (way.own[-1][0], value_end), (mark, -1)) if state.first and way.own else way.own
        if state.first and not way.own:
            own = ((None, value_end), (mark, -1))
        following = _State("value", place + 1, state.keys | {mark.name}, state.first)
        self._push(way, cost, place, following, own=own)

    def _function_end(
        self,
        way: _Way,
        place: int,
        cost: int,
        value_end: int | None,
        quoting: bool = False,
        strict: bool = True,
    ) -> None:
        """The mark at ``place`` ends the function."""
        form = self.r.form
        if form.section_end is None or form.grouped:
            # A group's own end is no part of the call: the reader drops it.
            self._end(way, place, cost, value_end, quoting, strict)
        elif self._next(place) == "/section":
            self._end(way, place + 1, cost, value_end, quoting, strict)
        else:
            self._end(way, place, cost + MISSING, value_end, quoting, strict=False)

    def _end(
        self,
        way: _Way,
        place: int,
        cost: int,
        value_end: int | None,
        quoting: bool = False,
        strict: bool = True,
    ) -> None:
        """The mark at ``place`` ends the call. An end that lacks a mark counts where nothing but calls follows."""
        r = self.r
        follows = self._follows(place)
        if follows == "text" and (quoting or not strict):
            return
        own, end = way.own, way.end
        if way.state.first:
            end = r.marks[place].end
            rest = r.text[end:]
            if not r.alone and follows == "text" and rest.partition("\n")[0].strip():
                return
            if r.fenced and closes_fence(rest):
                return
            if value_end is not None:
                own = (*own[:-1], (own[-1][0], value_end)) if own else ((None, value_end),)
        self._push(way, cost, place, _State("text", place + 1), own=own, end=end)

    def _follows(self, place: int) -> str:
        """Returns what follows a mark: "text", or "calls", which also stands for the end of the answer."""
        end = self.r.marks[place].end
        rest_end = self.r.marks[place + 1].start if place + 1 < len(self.r.marks) else len(self.r.text)
        if self.r.text[end:rest_end].strip():
            return "text"
        if place + 1 >= len(self.r.marks) or opens(self.r, place + 1) is not None:
            return "calls"
        grouped = self.r.form.grouped and self.r.marks[place + 1].kind == "/section"
        return self._follows(place + 1) if grouped else "text"

    def _text(self, way: _Way) -> None:
        partners, left = Partners(), 0
        marks = self.r.marks
        for place in range(way.state.place, len(marks)):
            inside = opens(self.r, place)
            if inside is not None:
                left += ALONE * sum(partners.open.values())
                self._inside(_Way(way.cost + left, way.choices, _State("text"), way.own, way.end), inside)
                self._push(way, left + UNREAD, place, _State("end"))
                return
            grouped_end = self.r.form.grouped and marks[place].kind == "/section"
            if not partners.add(marks[place].kind) and not grouped_end:
                left += LEFT_OVER
        left += ALONE * sum(partners.open.values())
        self._push(way, left, len(marks), _State("end"))


def opens(region: Region, place: int) -> int | None:
    """The mark after the function's, if a call of an offered function begins at mark ``place``, on a line's start."""
    marks, text = region.marks, region.text
    section = place
    if marks[place].kind == "section" and place + 1 < len(marks):
        between = text[marks[place].end : marks[place + 1].start]
        place += 0 if between.strip() else 1
    function = marks[place]
    if function.kind != "function" or function.name not in region.names or place + 1 >= len(marks):
        return None
    # Without its outer mark a call has to begin a line; with it, it may follow another call there.
    bare = place == section and region.form.section is not None
    before = marks[section - 1].end if section and not bare else 0
    if text[max(before, text.rfind("\n", 0, marks[section].start) + 1) : marks[section].start].strip():
        return None
    if text[function.end : marks[place + 1].start].strip():
        return None
    return place + 1 if marks[place + 1].kind in ("parameter", "/function", "/section") else None


def on_line(text: str, mark: Mark, before: str = "\n") -> bool:
    """The mark has a line of its own. ``before``: the character before the text."""
    left = text[mark.start - 1] if mark.start else before
    return left == "\n" and text[mark.end : mark.end + 1] in ("", "\n")


def closes_fence(text: str) -> bool:
    """A line of the text closes a code fence."""
    return any(line.lstrip().startswith("```") for line in text.split("\n")[1:])
