"""What is drawn on a terminal, seen through a small emulation of one, and what a pipe gets."""

from __future__ import annotations

import io
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from screen import Screen

from mlx_flashmoe import console as drawing
from mlx_flashmoe.console import (
    ConversionProgress,
    PlainAnswer,
    PromptProgress,
    TerminalAnswer,
    figures,
)
from mlx_flashmoe.generate import GenerationResponse
from mlx_flashmoe.thinking import ThinkingSplitter


def show(pieces: list[str], thinking: bool = False, height: int = 24, slow: bool = True) -> Screen:
    """Draws an answer; ``slow`` leaves time for a redraw at every piece."""
    screen = Screen(height=height)
    now = iter(range(10**9))
    view = TerminalAnswer(screen.console, thinking, clock=(lambda: next(now) * 100) if slow else lambda: 0.0)
    view.SHARE = 0
    for piece in pieces:
        view.feed(piece)
    view.close()
    assert screen.cursor, "the cursor stays hidden"
    return screen


ANSWER = """# Title

First *paragraph* of two lines,
not one.

1. one
2. two
   - deep

```python
def f(x):
    return x

# the end
```

| a | b |
|---|---|
| 1 | 2 |

> quoted

two lines of
#one paragraph

<b>html</b> and a [link](https://example.com)
***
last"""


def test_an_answer_is_the_same_however_it_comes() -> None:
    at_once = show([ANSWER], slow=False).text
    assert at_once == show(list(ANSWER)).text
    assert at_once == show([ANSWER[i : i + 7] for i in range(0, len(ANSWER), 7)]).text
    assert at_once == (
        "Title\n\nFirst paragraph of two lines,\nnot one.\n\n 1 one\n 2 two\n    • deep\n\n"
        "  def f(x):\n      return x\n\n  # the end\n\n"
        "a  b\n────\n1  2\n\n▌ quoted\n\ntwo lines of\n#one paragraph\n\n<b>html</b> and a link\n\n"
        + "-" * 80
        + "\n\nlast"
    )


@pytest.mark.parametrize("height", [3, 5, 10])
def test_a_block_taller_than_the_screen_loses_no_line(height: int) -> None:
    code = "\n".join(f"line {i}" for i in range(16))
    items = "\n".join(f"- item {i}" for i in range(16))
    paragraph = "\n".join(f"verse {i}" for i in range(16))
    text = f"before\n\n```\n{code}\n```\n\n{items}\n\n{paragraph}\n\nafter"
    screen = show(list(text), height=height)
    assert screen.text == show([text], slow=False, height=1000).text
    assert [row.strip() for row in screen.text.split("\n") if "line" in row] == code.split("\n")


def test_the_newest_line_of_a_tall_block_is_on_the_screen() -> None:
    screen = Screen(height=5)
    view = TerminalAnswer(screen.console, clock=iter(range(0, 10**9, 100)).__next__)
    view.SHARE = 0
    for i in range(20):
        view.feed(f"verse {i}\n")
        assert screen.rows[screen.row] == f"verse {i}"
    view.close()


def test_thinking_is_set_apart() -> None:
    text = "I should count.\n\nOne, two.\n</think>\n\nThree."
    expected = "Thinking\n  I should count.\n\n  One, two.\n\nThree."
    assert show(list(text), thinking=True).text == expected
    assert show([text], thinking=True, slow=False).text == expected
    assert show(["<think>\n", *text]).text == expected
    assert show(list("\n\n</think>\n\nThree."), thinking=True).text == "Three."
    assert show(list("Three."), thinking=True).text == "Thinking\n  Three."


def test_thinking_is_dim_and_the_answer_is_not() -> None:
    out = io.StringIO()
    view = TerminalAnswer(Console(file=out, force_terminal=True, width=80, highlight=False), thinking=True)
    view.feed("hm\n</think>\n\nyes")
    view.close()
    assert "\x1b[2mhm" in out.getvalue()
    assert out.getvalue().endswith("\ryes\n")


def test_an_interrupted_answer_is_kept() -> None:
    assert show(["Some *text* and `co"]).text == "Some text and `co"
    assert show([]).text == ""
    assert show(["thought"], thinking=True).text == "Thinking\n  thought"


def test_an_answer_cannot_steer_the_terminal() -> None:
    screen = show(["a\x1b[2Jb\x07\rc \x9b31m"])
    assert screen.text == "a␛[2Jb␇␍c \ufffd31m"


def test_drawing_takes_its_share_of_the_time_at_most() -> None:
    """One endless paragraph: a redraw costs more and more, so redraws must become rarer. Time here is made up:
    a millisecond a piece of text, ten microseconds a character drawn."""
    now = drawn = 0.0
    redraws = 0

    class Costly(drawing.MarkdownSection):
        def render(self, text: str):
            nonlocal now, drawn, redraws
            now += 1e-5 * len(text)
            drawn += 1e-5 * len(text)
            redraws += 1
            return super().render(text)

    view = TerminalAnswer(Screen().console, clock=lambda: now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "MarkdownSection", Costly)
        for _ in range(5000):
            view.feed("words ")
            now += 1e-3
    assert 5 < redraws < 5 / view.FRAME
    assert drawn < 1.2 * now / view.SHARE


def test_finished_blocks_are_not_drawn_again() -> None:
    """The cost of a long answer is that of its blocks: what is rendered stays small."""
    sizes: list[int] = []
    original = drawing.MarkdownSection.render

    class Counting(drawing.MarkdownSection):
        def render(self, text: str):
            sizes.append(len(text))
            return original(self, text)

    screen = Screen()
    view = TerminalAnswer(screen.console, clock=iter(range(0, 10**9, 100)).__next__)
    view.SHARE = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "MarkdownSection", Counting)
        for i in range(60):
            view.feed(f"Paragraph number {i}.\n\n")
        view.close()
    assert max(sizes) < 100
    assert screen.text.count("Paragraph") == 60


# Thinking or not


def split(pieces: list[str], thinking: bool) -> tuple[str, str]:
    splitter = ThinkingSplitter(thinking)
    parts: tuple[list[str], list[str]] = ([], [])
    for piece in pieces:
        for inside, text in splitter.feed(piece):
            parts[inside].append(text)
    for inside, text in splitter.finish():
        parts[inside].append(text)
    return "".join(parts[True]), "".join(parts[False])


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="<think>/ \nab", max_size=12).filter(lambda t: "</think>" not in t),
    st.text(alphabet="<think>/ \nab", max_size=12),
    st.data(),
)
def test_tags_are_found_however_they_are_cut(thought: str, answer: str, data: st.DataObject) -> None:
    text = f"{thought}</think>{answer}"
    thought, answer = text.split("</think>", 1)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert split(pieces, True) == (thought, answer)
    assert split([" \n<th", "ink>", *pieces], False) == (thought, answer)


def test_only_the_beginning_can_be_thinking() -> None:
    assert split(list("a <think> b </think>"), False) == ("", "a <think> b </think>")
    assert split(list("<thin"), False) == ("", "<thin")
    assert split(list("a</think>b</think><think>c"), True) == ("a", "b</think><think>c")


# Figures


def response(prompt: int = 23, answer: int = 214, tps: float = 5.2134) -> GenerationResponse:
    return GenerationResponse("", 0, None, prompt, 120.12, answer, tps, 6.1)  # type: ignore[arg-type]


def test_figures_are_one_line() -> None:
    assert figures(response(), 1_350_000_000, 710, 290) == (
        "prompt 23 tokens, 120 tok/s · generation 214 tokens, 5.21 tok/s · "
        "experts read 1.35 GB, 71% hits · peak memory 6.1 GB"
    )
    short = figures(response(), 1_350_000_000, 710, 290, width=80)
    assert short == "prompt 23 at 120/s · answer 214 at 5.21/s · read 1.35 GB, 71% hits · peak 6.1 GB"
    assert len(short) <= 80
    long = figures(response(prompt=12345, answer=2140), 135_000_000_000, 710, 290, width=80)
    assert long == "12345 + 2140 tokens at 120 and 5.21/s · read 135 GB, 71% hits · peak 6.1 GB"
    # One token has no rate, and a model without routed experts no hit rate.
    assert figures(response(answer=1, tps=0.0), 0, 0, 0) == (
        "prompt 23 tokens, 120 tok/s · generation 1 tokens · experts read 0 bytes · peak memory 6.1 GB"
    )


def test_a_terminal_shows_figures_under_the_answer() -> None:
    screen = Screen()
    view = TerminalAnswer(screen.console)
    view.feed("Three.")
    view.close()
    view.show_figures(response(), 1_350_000_000, 710, 290)
    assert screen.text.split("\n")[:2] == ["Three.", ""]
    assert screen.text.split("\n")[2].startswith("prompt 23")
    assert len(screen.text.split("\n")) == 3


def test_a_pipe_gets_exactly_the_text() -> None:
    out, err = io.StringIO(), io.StringIO()
    view = PlainAnswer(out, err)
    for piece in ("<think>\nhm", "\n</think>\n\n**yes**\x1b"):
        view.feed(piece)
    view.close()
    view.show_figures(response(), 0, 0, 0)
    assert out.getvalue() == "<think>\nhm\n</think>\n\n**yes**\x1b"
    assert err.getvalue() == "\n" + figures(response(), 0, 0, 0) + "\n"


# Progress


def test_a_quick_prompt_shows_nothing() -> None:
    screen = Screen()
    progress = PromptProgress(screen.console, delay=30)
    progress(0, 10)
    progress(10, 10)
    progress.close()
    assert screen.rows == [""]


def test_a_long_prompt_shows_a_bar_that_goes_away() -> None:
    screen = Screen()
    progress = PromptProgress(screen.console, delay=0.01)
    progress(0, 3000)
    progress(2048, 3000)
    deadline = time.monotonic() + 5
    while "2048/3000 tokens" not in screen.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "Reading the prompt" in screen.text and "2048/3000 tokens" in screen.text
    progress(3000, 3000)
    assert screen.text == "" and screen.cursor


def test_a_conversion_in_a_pipe_says_a_line_now_and_then() -> None:
    out = io.StringIO()
    now = 0.0
    display = ConversionProgress(Console(file=out, width=80, soft_wrap=True), clock=lambda: now)
    with display:
        display.note("vision tower left out " + "x" * 100)
        for i in range(101):
            display.progress(40_000_000 + i * 1_000_000, 140_000_000, f"layer {i // 10}")
            now += 0.2
    lines = out.getvalue().splitlines()
    assert lines[0] == "vision tower left out " + "x" * 100
    assert len(lines) == 1 + 4  # 20 seconds, a line every 5 of them and one at the end
    # The rate counts what was done here, not what an earlier run had done already.
    assert lines[1] == "46% · 65 MB of 140 MB · 5 MB/s · 15 s left · layer 2"
    assert lines[-1] == "100% · 140 MB of 140 MB · 5 MB/s · 0 s left · layer 10"


def test_a_conversion_on_a_terminal_is_a_bar() -> None:
    screen = Screen(width=100)
    with ConversionProgress(screen.console) as display:
        display.progress(0, 209_000_000_000, "layer 0 of 60")
        display.progress(105_000_000_000, 209_000_000_000, "layer 31 of 60")
        display.note("a remark")
    last = screen.text.split("\n")
    assert last[0] == "a remark"
    assert "layer 31 of 60" in last[-1] and "105.0/209.0 GB" in last[-1]
    assert len(last) == 2 and screen.cursor


def test_notes_of_a_conversion_break_between_words() -> None:
    screen = Screen(width=40)
    with ConversionProgress(screen.console) as display:
        display.progress(0, 100, "layer 0")
        display.note("8 layers of 64 experts: 4 bits in groups of 32; 16,384 bytes per expert")
    assert screen.text.split("\n")[:2] == [
        "8 layers of 64 experts: 4 bits in groups",
        "of 32; 16,384 bytes per expert",
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_ctrl_c_leaves_one_bar(width: int) -> None:
    """The terminal writes ^C after the bar: in the same line there is room for it, so that the bar is drawn over it."""
    screen = Screen(width=width)
    with ConversionProgress(screen.console) as display:
        display.progress(0, 209_000_000_000, "layer 0 of 60")
        display.progress(105_000_000_000, 209_000_000_000, "layer 31 of 60")
        assert 0 < screen.column <= width - len("^C") and "layer" in screen.rows[screen.row]
        screen.write("^C")
    assert screen.text.count("layer 31") == 1 and "^C" not in screen.text


def test_errors_are_one_unbroken_line(capsys: pytest.CaptureFixture[str]) -> None:
    message = "/a/very/long/path/" + "x" * 200 + "\nand a second line [bold]\x1b[2J"
    drawing.print_error(message)
    err = capsys.readouterr().err
    assert err == "error: /a/very/long/path/" + "x" * 200 + " and a second line [bold]␛[2J\n"
