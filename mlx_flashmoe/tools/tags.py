"""Reads a call in tags while it is written: ``<function=NAME>``, ``<parameter=KEY>`` and plain text between them.

A value is shown as it comes, up to the first place where it may have ended. From there on the call is held, until
what follows decides (:mod:`mlx_flashmoe.tools.ends`): the end of the answer, or another call. A call that stands in
a sentence or in a code fence is held from its beginning: it may be prose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_flashmoe.thinking import overlap
from mlx_flashmoe.tools.arguments import ArgumentWriter, PlainValue
from mlx_flashmoe.tools.ends import Partners, Plan, Region, choose, closes_fence, on_line, opens
from mlx_flashmoe.tools.events import Cut, Reading, Text
from mlx_flashmoe.tools.marks import Mark, TagMarks

LIMIT = 256
"""Marks after a possible end that are held. The text decides by then, or the possible end was none."""
_PROSE_LIMIT = 48

# Closing marks in a row that may end a call, or can become such a row.
_ENDS = {
    ("/parameter",),
    ("/parameter", "/function"),
    ("/parameter", "/section"),
    ("/parameter", "/function", "/section"),
    ("/function",),
    ("/function", "/section"),
    ("/section",),
}


class TagReader:
    """Reads one call, from its first mark on.

    Args:
        schemas: of the offered functions' parameters, by function name.
        alone: no text stands before the call on its line.
        fenced: the call stands in an open code fence.

    Attributes:
        rest: text that the call has left over; None while the call may take more.
        begun: it is a call for sure, and its name is out.
    """

    def __init__(self, form: TagMarks, schemas: Mapping[str, Any], alone: bool, fenced: bool) -> None:
        self.rest: str | None = None
        self.begun = False
        self._form, self._schemas = form, schemas
        self._alone, self._fenced = alone, fenced
        self._settled: list[str] = []  # the call's text that is dealt with
        self._text = ""  # the rest of it, from which marks are read
        self._before, self._filled = "\n", False  # the character before that; the value has text before that
        self._scanned = 0
        self._head: list[Mark] = []  # up to the function's mark
        self._name = ""
        self._writer: ArgumentWriter | None = None
        self._value: PlainValue | None = None
        self._partners: Partners | None = None  # of the value that is being shown
        self._keys: frozenset[str] = frozenset()
        self._lines = True  # all marks so far that belong to the call have lines of their own
        self._held = False
        self._marks: list[Mark] = []  # that are not settled
        self._walk = Partners()  # of the value, if it does not end at any of these
        self._quoting: list[bool] = []  # before each of them
        self._ended = -1  # where the first end is that no quoted call can have
        self._nearly = -1  # marks up to the last such end that lacks the section's mark

    def feed(self, text: str) -> list[Reading]:
        self._text += text
        return self._scan(self._form.beginning(self._text, self._scanned))

    def finish(self) -> list[Reading]:
        """The answer ends here."""
        plan, closing = None, self._form.section_end or ""
        # The answer may have been cut within the last mark.
        part = overlap(self._text, closing) if not self._text.endswith(closing) else 0
        events = self._scan(len(self._text) - part, last=True)
        if self.rest is not None:
            return events
        if self._head and self._head[-1].kind == "function":
            plan = choose(self._region(len(self._marks), len(self._text) - part, last=True))
        if plan is not None:
            lacks = not self._text[: plan.end].endswith(closing)
            if part and lacks and self._text[plan.end :].strip() == self._text[-part:]:
                plan = replace(plan, end=len(self._text))
            return events + self._carry_out(plan)
        if self.begun:
            self.rest = ""
            return [*events, Cut("".join(self._settled) + self._text)]
        return events + self._prose(self._head[0].end if self._head else len(self._text))

    def _scan(self, end: int, last: bool = False) -> list[Reading]:
        events: list[Reading] = []
        while self.rest is None:
            mark = self._form.find(self._text, self._scanned, end)
            if mark is not None and not last and mark.end == len(self._text):
                end, mark = mark.start, None  # what follows a mark counts, too
            stop = mark.start if mark else max(end, self._scanned)
            if self._text[self._scanned : stop].strip():
                shift = len(self._text)
                events += self._plain()
                shift -= len(self._text)
                stop, end = stop - shift, end - shift
                mark = mark and Mark(mark.kind, mark.start - shift, mark.end - shift, mark.name, mark.string)
                if self.rest is not None:
                    break
            self._scanned = mark.end if mark else stop
            if mark is None:
                events += self._show()
                break
            length = len(self._text)
            events += self._take(mark)
            end -= length - len(self._text)
        return events

    # New marks

    def _plain(self) -> list[Reading]:
        """Text follows the marks so far."""
        if self._partners is None:
            if not self._head or self._head[-1].kind != "function" or not self._marks:
                return self._prose(self._head[0].end) if self._head else []
            return self._maybe_prose()
        if not self._held and self._marks:
            return self._pass()  # so what was there is no end
        return []

    def _take(self, mark: Mark) -> list[Reading]:
        if not self._head or self._head[-1].kind == "section":
            return self._take_head(mark)
        if self._partners is None and not self._marks:
            if mark.kind not in ("parameter", "/function", "/section"):
                return self._prose(self._head[0].end)
            if mark.kind == "parameter" and self._alone and not self._fenced:
                return self._begin(mark)
            self._held = True
        if self._held:
            return self._hold(mark)
        return self._take_in_value(mark)

    def _take_head(self, mark: Mark) -> list[Reading]:
        self._head.append(mark)
        if mark.kind == "function" and mark.name in self._schemas:
            self._name, self._writer = mark.name, ArgumentWriter(mark.name)
            self._lines = self._form.trim and all(on_line(self._text, m, self._before) for m in self._head)
        elif mark.kind != "section" or len(self._head) > 1:
            return self._prose(self._head[0].end)
        return []

    def _begin(self, parameter: Mark) -> list[Reading]:
        assert self._writer is not None
        self.begun = True
        self._lines = self._lines and on_line(self._text, parameter, self._before)
        return self._writer.start() + self._parameter(parameter)

    def _parameter(self, mark: Mark) -> list[Reading]:
        assert self._writer is not None
        trim, schema = self._form.trim, self._schemas[self._name]
        self._value = PlainValue(self._writer, mark.name, schema, trim, mark.string)
        self._keys |= {mark.name}
        self._partners, self._marks = Partners(), []
        self._settle(mark.end)
        self._filled = False
        return []

    def _take_in_value(self, mark: Mark) -> list[Reading]:
        assert self._partners is not None and self._value is not None
        row = (*(m.kind for m in self._marks), mark.kind)
        events: list[Reading] = []
        if mark.kind.startswith("/"):
            while row not in _ENDS:  # what came before is no end
                events += self._pass(len(self._marks) - len(row) + 2)
                mark, row = self._moved(mark), row[1:]
            self._marks.append(mark)
            whole = ("/parameter", "/function", "/section")
            if row == (whole[:2] if self._form.section_end is None or self._form.grouped else whole):
                return events + self._hold_all()
            return events
        if mark.kind == "parameter" and mark.name not in self._keys:
            follows = row == ("/parameter", "parameter") and not self._partners.alone
            if follows and (
                not self._lines or all(on_line(self._text, m, self._before) for m in (self._marks[0], mark))
            ):
                end = self._marks[0].start
                return self._value.feed(self._text[:end]) + self._value.end() + self._parameter(mark)
            known = mark.name in self._schemas[self._name].get("properties", {})
            alone = on_line(self._text, mark, self._before) and not any(self._partners.open.values())
            bare = len(row) == 1 and known and alone
            if row == ("/parameter", "parameter") or bare:
                self._marks.append(mark)
                return self._hold_all()
        elif len(row) > 1 and row[:-1] != ("/parameter",):  # another call, perhaps
            self._marks.append(mark)
            return self._hold_all()
        self._marks.append(mark)
        return self._pass()

    def _moved(self, mark: Mark) -> Mark:
        """The mark that has just been found, whose text may have moved."""
        shift = mark.end - self._scanned
        return Mark(mark.kind, mark.start - shift, mark.end - shift, mark.name, mark.string)

    # Showing and holding

    def _settle(self, end: int) -> None:
        self._settled.append(self._text[:end])
        self._before = self._text[end - 1] if end else self._before
        self._filled = self._filled or bool(self._text[:end].strip())
        self._text = self._text[end:]
        self._scanned = max(0, self._scanned - end)

    def _show(self) -> list[Reading]:
        """Shows the value's text up to where it is read."""
        if self._value is None or self._marks or not self._scanned:
            return []
        # White space may stand before a mark, and be the form's.
        end = len(self._text[: self._scanned].rstrip())
        events = self._value.feed(self._text[:end])
        self._settle(end)
        return events

    def _pass(self, count: int | None = None) -> list[Reading]:
        """The first marks that wait are the value's text."""
        assert self._value is not None and self._partners is not None
        count = len(self._marks) if count is None else count
        if not count:
            return []
        passed, self._marks = self._marks[:count], self._marks[count:]
        for mark in passed:
            self._partners.add(mark.kind)
        end = passed[-1].end
        events = self._value.feed(self._text[:end])
        self._settle(end)
        self._marks = [Mark(m.kind, m.start - end, m.end - end, m.name, m.string) for m in self._marks]
        return events

    def _hold_all(self) -> list[Reading]:
        assert self._partners is not None
        self._held, self._walk, self._quoting = True, self._partners.copy(), []
        self._ended = self._nearly = -1
        waiting, self._marks = self._marks, []
        events: list[Reading] = []
        for mark in waiting:
            events += self._hold(mark)
        return events

    def _hold(self, mark: Mark) -> list[Reading]:
        """One more mark after a place where the call may have ended."""
        self._quoting.append(self._walk.quoting)
        self._walk.add(mark.kind)
        self._marks.append(mark)
        count = len(self._marks)
        self._note_end()
        if count > 2 and self._marks[-2].kind == "function" and not self._fenced:
            section = count > 3 and self._marks[-3].kind == "section"
            start = count - 3 if section else count - 2
            ended = self._ended >= 0 or start == self._nearly
            whole = self._region(count, len(self._text), last=False)
            if (ended or not self.begun) and opens(whole, start) == count - 1:
                cut = self._marks[start].start
                plan = choose(self._region(start, cut, last=False))
                if plan is not None:
                    return self._carry_out(plan)
                return [] if self.begun else self._prose(cut)
        if count <= (LIMIT if self.begun else _PROSE_LIMIT):
            return []
        if not self.begun:
            return self._prose(self._head[0].end if self._fenced else mark.start)
        plan = choose(self._region(count, mark.end, last=False)) if self._ended >= 0 else None
        if plan is not None:
            return self._carry_out(plan)
        self._held = False
        return self._pass()

    def _note_end(self) -> None:
        """Notes an end of the call, unless it may belong to a call that the value quotes."""
        marks, form = self._marks, self._form
        sections = form.section_end is not None and not form.grouped
        closing = sections and marks[-1].kind == "/section"
        place = len(marks) - (2 if closing else 1)
        if place < 0 or marks[place].kind != "/function" or (closing and self._apart(place)):
            return
        empty = place == 0 and self._partners is None
        after_value = place > 0 and marks[place - 1].kind == "/parameter" and not self._apart(place - 1)
        if empty or (after_value and not self._quoting[place - 1]):
            self._nearly = len(marks)
            if self._ended < 0 and (closing or not sections):
                self._ended = marks[-1].end

    def _apart(self, place: int) -> bool:
        """Text stands between a mark and the next one."""
        return bool(self._text[self._marks[place].end : self._marks[place + 1].start].strip())

    # Decisions

    def _region(self, marks: int, end: int, last: bool) -> Region:
        return Region(
            self._form,
            self._text[:end],
            self._marks[:marks],
            self._partners,
            self._keys,
            self._schemas[self._name].get("properties", {}),
            self._schemas,
            last,
            self._alone,
            self._fenced,
            self._lines,
            self._before,
            self._filled,
        )

    def _maybe_prose(self) -> list[Reading]:
        """A call in a sentence or a fence has ended, and text follows: does the sentence, or the fence, too?"""
        if self._ended < 0:
            return []
        # A mark is no text of a sentence: another call may follow on the line.
        following = next((m.start for m in self._marks if m.start >= self._ended), len(self._text))
        sentence = not self._alone and self._text[self._ended : following].partition("\n")[0].strip()
        if sentence or (self._fenced and closes_fence(self._text[self._ended :])):
            return self._prose(self._ended)
        return []

    def _prose(self, end: int) -> list[Reading]:
        """It is no call: text up to ``end``, and whatever comes from there on is left over."""
        self.rest = self._text[end:]
        return [Text(self._text[:end])] if end else []

    def _carry_out(self, plan: Plan) -> list[Reading]:
        assert self._writer is not None
        events: list[Reading] = [] if self.begun else self._writer.start()
        parameters, text, place = list(plan.parameters), self._text, 0
        for end in plan.ends:
            if self._value is None:
                self._value = self._new_value(parameters[0])
                place = parameters.pop(0).end
            events += self._value.feed(text[place:end]) + self._value.end()
            self._value = None
        end = plan.end
        section_end = self._form.section_end
        if self._form.grouped and section_end and text[end:].lstrip().startswith(section_end):
            end = text.index(section_end, end) + len(section_end)
        self.rest = text[end:]
        return events + self._writer.end("".join(self._settled) + text[:end])

    def _new_value(self, mark: Mark) -> PlainValue:
        assert self._writer is not None
        return PlainValue(self._writer, mark.name, self._schemas[self._name], self._form.trim, mark.string)
