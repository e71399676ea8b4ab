"""The chat: conversations over models whose every answer is known, as a terminal and as a pipe see them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from fakes import FakeModel, ScriptedModel, TalkingModel, make_checkpoint, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from screen import Screen

from mlx_flashmoe import convert
from mlx_flashmoe.chat import commands as chat_commands
from mlx_flashmoe.chat import conversation as conversations
from mlx_flashmoe.chat.conversation import Conversation
from mlx_flashmoe.chat.editor import Editor, Lines
from mlx_flashmoe.chat.functions import from_function
from mlx_flashmoe.chat.loop import chat
from mlx_flashmoe.chat.session import Session, data_directory
from mlx_flashmoe.chat.settings import Settings
from mlx_flashmoe.chat.view import PlainView, TerminalView
from mlx_flashmoe.errors import MemoryPlanError, RequestError
from mlx_flashmoe.prefix_cache import PrefixCache
from mlx_flashmoe.tools import Text, Thinking, ToolCall

TOKENIZER = tokenizer()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def add(a: int, b: int = 1) -> int:
    """Adds.

    Args:
        a: a number.
    """
    return a + b


def call(name: str, **arguments: Any) -> str:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


class Recording(PlainView):
    """What is written to each stream."""

    def __init__(self) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        super().__init__(self.out, self.err)


def talk(model: FakeModel, *texts: str, functions: tuple = (add,), **options: Any) -> Conversation:
    tools = [from_function(f, "here") for f in functions]
    conversation = Conversation(model, TOKENIZER, Session(), Recording(), tools, **options)
    for text in texts:
        conversation.say(text)
    return conversation


# Turns


def test_answers_and_thoughts_become_messages() -> None:
    model = TalkingModel("Hm.\n</think>\n\nHello **you**.", "\n</think>\n\nGood.")
    conversation = talk(model, "Hi", "How are you?")
    assert conversation.session.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello **you**.", "reasoning_content": "Hm."},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Good."},
    ]
    view: Any = conversation._view
    assert view.out.getvalue() == "Hello **you**.\nGood.\n"
    lines = view.err.getvalue().splitlines()
    assert re.fullmatch(
        r"\d+ tokens, \S+ tok/s · prompt \d+ new of \d+ · 75% hits · read \d+ kB · context \d+ of 4096",
        lines[0],
    )
    assert conversation.thinking == ""


def test_tools_are_called_until_the_model_is_done() -> None:
    model = TalkingModel(
        f"So.\n</think>\n\nLet me add.\n\n{call('add', a=2, b=3)}\n{call('add', a='x')}",
        "\n</think>\n\nFive.",
    )
    conversation = talk(model, "2 + 3?")

    def made(name: str, **arguments: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    assert conversation.session.messages[1:] == [
        {
            "role": "assistant",
            "content": "Let me add.",
            "reasoning_content": "So.",
            "tool_calls": [made("add", a=2, b=3), made("add", a="x")],
        },
        {"role": "tool", "name": "add", "content": "5"},
        {
            "role": "tool",
            "name": "add",
            "content": 'Error: TypeError: can only concatenate str (not "int") to str',
        },
        {"role": "assistant", "content": "Five."},
    ]
    view: Any = conversation._view
    assert view.out.getvalue() == "Let me add.\nFive.\n"
    assert 'add {"a": 2, "b": 3}\n5\n' in view.err.getvalue()


def test_rounds_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "ROUNDS", 3)
    model = TalkingModel(*[f"\n</think>\n\n{call('add', a=1)}"] * 5)
    conversation = talk(model, "Go.")
    assert [m["role"] for m in conversation.session.messages] == ["user", *["assistant", "tool"] * 3]
    view: Any = conversation._view
    assert "stopped after 3 answers with tool calls" in view.err.getvalue()


def test_without_tools_nothing_is_a_call() -> None:
    text = call("add", a=1)
    conversation = talk(TalkingModel(f"\n</think>\n\n{text}"), "Go.", functions=())
    assert conversation.session.messages[1:] == [{"role": "assistant", "content": text}]


def test_an_answer_cut_off_says_so() -> None:
    conversation = talk(
        TalkingModel("\n</think>\n\none two three four five"), "Go.", settings=Settings(max_tokens=9)
    )
    view: Any = conversation._view
    assert "cut off after 9 tokens (--max-tokens)" in view.err.getvalue()
    assert conversation.session.messages[1]["content"] != ""


def test_a_full_context_says_how_to_go_on() -> None:
    model: Any = TalkingModel("\n</think>\n\none two three four five", "\n</think>\n\nYes.")
    prompt = len(TOKENIZER.apply_chat_template([{"role": "user", "content": "Go."}]))
    model.max_context = prompt + 9
    conversation = talk(model, "Go.", functions=(), settings=Settings(max_tokens=5000))
    view: Any = conversation._view
    full = f"cut off: the context of {prompt + 9} tokens is full; /clear begins a new conversation"
    assert full in view.err.getvalue()
    with pytest.raises(RequestError, match=rf"context of {prompt + 9} tokens.*/clear begins a new conv"):
        conversation.say("Go on.")
    assert conversation.unsent == "Go on."


def test_the_second_turn_reads_only_what_is_new() -> None:
    model = TalkingModel("So long a thought.\n</think>\n\nYes.", "\n</think>\n\nNo.")
    prefixes = PrefixCache("ab" * 32, TOKENIZER.message_start_id)
    conversation = talk(model, "Is it?", prefix_cache=prefixes)
    first = len(TOKENIZER.apply_chat_template(conversation.session.messages[:1], add_generation_prompt=False))
    model.calls.clear()
    conversation.say("Is it not?")
    new = len(
        TOKENIZER.encode("<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nIs it not?<|im_end|>\n")
    )
    opening = len(TOKENIZER.encode("<|im_start|>assistant\n<think>\n"))
    assert conversation.figures[1].response.cached_tokens == first
    assert model.calls[:3] == [new, opening - 1, 1]
    assert conversation.session.messages[-1]["content"] == "No."


# Stopping


class Interrupted(TalkingModel):
    """Ctrl-C comes at a call of the model."""

    def __init__(self, at: int, *answers: str) -> None:
        super().__init__(*answers)
        self.at = at

    def __call__(self, tokens: mx.array, cache: list) -> mx.array:
        if len(self.calls) == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(tokens, cache)


ANSWER = "Hm.\n</think>\n\none two three four five six seven eight"


def test_ctrl_c_keeps_what_was_said() -> None:
    model = Interrupted(12, ANSWER, "\n</think>\n\nNext.")
    conversation = talk(model, "Count.")
    assert conversation.stopped and conversation.unsent == ""
    said = conversation.session.messages[1]["content"]
    assert said and ANSWER.split("\n\n")[1].startswith(said) and "eight" not in said
    conversation.say("Go on.")
    assert not conversation.stopped and conversation.session.messages[-1]["content"] == "Next."
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_the_prompt_is_read_takes_the_message_back() -> None:
    conversation = talk(Interrupted(0, ANSWER), "Count. " * 20, prefill_step_size=8)
    assert conversation.stopped and conversation.unsent == "Count. " * 20
    assert conversation.session.messages == [] and conversation.figures == []


def test_a_call_is_not_made_when_its_answer_was_stopped() -> None:
    text = f"\n</think>\n\n{call('add', a=1)}\n{call('add', a=2)}"
    calls = len(TOKENIZER.encode(text))
    conversation = talk(Interrupted(calls - 2, text), "Go.")
    assert conversation.stopped
    assert conversation.session.messages[1:] == [{"role": "assistant", "content": ""}]


def test_ctrl_c_in_a_tool_ends_the_turn_with_every_call_answered() -> None:
    def hang() -> None:
        """Hangs."""
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    model = TalkingModel(
        f"\n</think>\n\n{call('add', a=1)}\n{call('hang')}\n{call('add', a=2)}", "\n</think>\n\nOK."
    )
    conversation = talk(model, "Go.", functions=(add, hang))
    assert conversation.stopped
    results = [m["content"] for m in conversation.session.messages if m["role"] == "tool"]
    assert results == ["2", "The user stopped this.", "The user stopped this before it began."]
    conversation.say("Go on.")
    assert conversation.session.messages[-1]["content"] == "OK."


def test_a_second_ctrl_c_interrupts_anything() -> None:
    class Stuck(TalkingModel):
        def __call__(self, tokens: mx.array, cache: list) -> mx.array:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(tokens, cache)

    conversation = talk(Stuck(ANSWER))
    with pytest.raises(KeyboardInterrupt):
        conversation.say("Count.")
    assert conversation.session.messages == [] and conversation.unsent == "Count."
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_takes_the_message_back() -> None:
    class Small(TalkingModel):
        def reserve(self, context: int) -> None:
            raise MemoryPlanError(f"{context} tokens do not fit")

    conversation = talk(Small(ANSWER), settings=Settings(max_tokens=100))
    with pytest.raises(MemoryPlanError, match=r"1\d\d tokens do not fit"):
        conversation.say("Count.")
    assert conversation.session.messages == [] and conversation.unsent == "Count."


# Sessions

messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text()},
        optional={"reasoning_content": st.text(), "tool_calls": st.just([{"function": {"name": "f"}}])},
    )
)


@given(messages)
def test_a_session_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, said: list) -> None:
    path = tmp_path_factory.mktemp("session") / "deeper" / "s.jsonl"
    session = Session(path, said)
    session.save()
    assert Session.load(path).messages == said
    assert path.read_text().count("\n") == len(said)
    assert path.stat().st_mode & 0o077 == 0 and os.listdir(path.parent) == ["s.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "1",
        '{"role": "user"}',
        '{"role": "robot", "content": ""}',
        '{"role": "user", "content": 1}',
    ],
)
def test_a_line_that_is_no_message_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text('{"role": "user", "content": "a"}\n' + line + "\n")
    with pytest.raises(RequestError, match=r"s\.jsonl: line 2 is not a message"):
        Session.load(file)


def test_sessions_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing: cannot be read as a conversation: No such file"):
        Session.load(tmp_path / "nothing")
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(RequestError, match="bytes: cannot be read"):
        Session.load(tmp_path / "bytes")
    with pytest.raises(RequestError, match="cannot be saved: File exists"):
        Session(tmp_path / "bytes" / "s.jsonl").save()
    with pytest.raises(RequestError, match="no conversation to resume"):
        Session.latest()


def test_the_latest_session_is_the_one_saved_last() -> None:
    first, second = Session.new(), Session.new()
    assert first.path != second.path
    for session in (second, first):
        session.messages.append({"role": "user", "content": str(session.path)})
        session.save()
        os.utime(session.path, (1 if session is second else 2,) * 2)
    assert Session.latest().messages == first.messages


def test_the_system_message_stands_first() -> None:
    session = Session(None, [{"role": "user", "content": "a"}])
    for text in ("one", "two"):
        session.system = text
        assert [m["content"] for m in session.messages] == [text, "a"] and session.system == text
    session.system = None
    assert [m["content"] for m in session.messages] == ["a"] and session.system is None


# Commands


class Typed:
    """Messages as if typed on a terminal."""

    interactive = True

    def __init__(self, *texts: str | type[BaseException]) -> None:
        self.texts, self.defaults, self.dropped = list(texts), [], 0

    def read(self, default: str = "") -> str:
        self.defaults.append(default)
        if not self.texts:
            raise EOFError
        text = self.texts.pop(0)
        if not isinstance(text, str):
            raise text
        return text

    def drop_typed(self) -> None:
        self.dropped += 1


def chatting(
    model: FakeModel, *texts: Any, session: Session | None = None
) -> tuple[str, Conversation, Typed]:
    """What a terminal shows of a chat, 80 columns wide."""
    screen = Screen(height=30)
    view = TerminalView(screen.console)
    conversation = Conversation(
        model, TOKENIZER, session or Session.new(), view, [from_function(add, "here")]
    )
    reader = Typed(*texts)
    chat(conversation, reader, view)
    assert screen.cursor
    assert max(map(len, screen.text.split("\n"))) <= 80
    return screen.text, conversation, reader


def test_a_conversation_on_a_terminal() -> None:
    text, conversation, _ = chatting(
        TalkingModel(
            f"A thought.\n</think>\n\nLet me *see*.\n\n{call('add', a=1)}",
            "Another.\n</think>\n\n- two",
        ),
        "1 + 1?",
        "/think",
        "/quit",
        "never read",
    )
    text = re.sub(r"\d+ tokens, .*", "FIGURES", text)
    assert text.split("\n", 1)[1] == (
        "Thought for 1 s (/think shows it)\n\nLet me see.\n\n"
        "╭─ add ─╮\n│ a: 1  │\n╰───────╯\n  2\n\nFIGURES\n\n"
        "Thought for 1 s (/think shows it)\n\n • two\n\nFIGURES\n\n  Another."
    )
    assert Session.latest().messages == conversation.session.messages


def test_commands() -> None:
    model = TalkingModel("\n</think>\n\nYes.")
    text, conversation, _ = chatting(
        model,
        "/help",
        "/tools",
        "/think",
        "/system",
        "/system Be brief.",
        "Go.",
        "/stats",
        "/save",
        "/clear",
        "/system",
    )
    for shown in (
        *chat_commands.HELP.values(),
        "  add  Adds.",
        "nothing was thought before",
        "there is no system message",
        "  messages     3",
        "  answers      1 of ",
        "  memory       none",
        "a new conversation\nBe brief.",
    ):
        assert shown in text, shown
    assert "conversation is saved in" in text
    assert [m["content"] for m in conversation.session.messages] == ["Be brief."]
    assert [m["content"] for m in Session.latest().messages] == ["Be brief.", "Go.", "Yes."]


def test_save_and_load(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    _, first, _ = chatting(
        TalkingModel("\n</think>\n\nYes."), "Go.", f"/save {file}", "/load nowhere", f"/save {file}"
    )
    assert Session.load(file).messages == first.session.messages
    text, second, _ = chatting(
        TalkingModel("\n</think>\n\nNo."), f"/load {file}", "Go on.", "/load", f"/save {file}"
    )
    assert "kept.jsonl:2messages" in "".join(text.split())  # wherever a long path wraps
    assert [m["content"] for m in Session.load(file).messages] == ["Go.", "Yes.", "Go on.", "No."]
    assert second.session.path == file


def test_the_last_message_can_be_sent_again_changed_and_taken_back() -> None:
    model = TalkingModel(*[f"\n</think>\n\n{answer}" for answer in ("One.", "Two.", "Three.", "Four.")])
    text, conversation, reader = chatting(
        model, "A?", "/retry", "B?", "/undo", "/edit", "C?", "/undo", "/undo", "/retry", "/edit"
    )
    assert text.count("taken back") == 2 and "taken back, with what came of it: B?" in text
    # The message that /edit took back stood in the editor, where "C?" took its place.
    assert reader.defaults == ["", "", "", "", "", "A?", "", "", "", "", ""]
    assert conversation.session.messages == Session.latest().messages == []
    assert [f.response.generation_tokens > 0 for f in conversation.figures] == [True] * 4


def test_taking_back_leaves_what_was_before(tmp_path: Path) -> None:
    said = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "content": "D"},
        {"role": "assistant", "content": "E"},
    ]
    session = Session(tmp_path / "s.jsonl", list(said))
    assert session.take_back() == "C" and session.messages == said[:3]
    assert Session.load(tmp_path / "s.jsonl").messages == said[:3]
    assert session.take_back() == "A" and session.messages == said[:1]
    with pytest.raises(RequestError, match="no message to take back"):
        session.take_back()


def test_settings_change_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [f"\n</think>\n\n{'word ' * 30}"] * 3
    model = TalkingModel(*answers)
    text, conversation, _ = chatting(
        model,
        "/set",
        "/set max-tokens 5",
        "Go.",
        "/set max_tokens 7",
        "/set temp 0.7",
        "Go.",
        "/set think off",
        "/set",
    )
    assert [f.response.generation_tokens for f in conversation.figures] == [5, 7]
    shown = [line.split() for line in text.split("\n")]
    assert ["max-tokens", "-1"] in shown and ["max-tokens", "7"] in shown and ["seed", "not", "set"] in shown
    assert ["temp", "is", "0.7"] in shown and ["temp", "0.7"] in shown
    assert ["think", "is", "off"] in shown and shown[-1] == ["think", "off"]
    assert "it was still thinking" not in text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("heat", "1", "there is no setting heat; /set lists them"),
        ("temp", "hot", "temp is a number, not 'hot'"),
        ("temp", "-1", "temp .* should be a number of at least 0"),
        ("temp", "nan", "temp .* should be"),
        ("top-k", "0.5", "top-k is a whole number, not '0.5'"),
        ("top_p", "1.5", "top_p .* should be between 0 and 1"),
        ("max-tokens", "0", "max_tokens .* at least 1"),
        ("think", "maybe", "think is on or off, not 'maybe'"),
    ],
)
def test_a_setting_that_cannot_be_leaves_all_as_it_was(name: str, value: str, message: str) -> None:
    settings = Settings({"temp": 0.5, "top_k": 3}, 100, True)
    before = settings.rows(), settings.generation, settings.template
    with pytest.raises(RequestError, match=message):
        settings.set(name, value)
    assert (settings.rows(), settings.generation, settings.template) == before


def test_thinking_is_switched_where_the_template_has_a_switch() -> None:
    conversation = talk(TalkingModel("\n</think>\n\nYes."), "Go.", functions=())
    assert conversation.can_switch_thinking
    question = [{"role": "user", "content": "Go."}]
    for think, word in ((False, "off"), (True, "on")):
        conversation.settings.set("think", word)
        asked = TOKENIZER.apply_chat_template(question, **conversation.settings.template)
        assert TOKENIZER.opens_thinking(asked) is think

    conversation.settings.set("think", "off")
    length = len(TOKENIZER.apply_chat_template(question, enable_thinking=False))
    conversation.model = ScriptedModel(length, [TOKENIZER.token_id("<|im_end|>")])
    conversation.session.messages.clear()
    conversation.say("Go.")
    assert conversation.figures[-1].response.prompt_tokens == length


def test_an_answer_that_is_all_thinking_says_what_to_do() -> None:
    conversation = talk(TalkingModel("one two three four five six"), "Go.", settings=Settings(max_tokens=4))
    view: Any = conversation._view
    assert view.err.getvalue().splitlines()[-1] == (
        "the answer was cut off after 4 tokens (--max-tokens); it was still thinking: "
        "/set max-tokens to more, or /set think off"
    )


def saved(name: str, *texts: str, when: float = 1e9) -> Path:
    file = data_directory() / "sessions" / f"{name}.jsonl"
    roles = ("user", "assistant")
    Session(file, [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]).save()
    os.utime(file, (when, when))
    return file


def test_saved_conversations_are_listed_and_loaded_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    saved("older", "How far is\nthe moon?", "Far.", when=1e9)
    saved(
        "newer",
        "Why " + "is the sky " * 20 + "blue?",
        "Because " * 100,
        "And green?",
        "No.",
        "Red?",
        "At dusk.",
        when=2e9,
    )
    (data_directory() / "sessions" / "broken.jsonl").write_text("{")
    os.utime(data_directory() / "sessions" / "broken.jsonl", (3e9, 3e9))
    text, conversation, _ = chatting(
        TalkingModel(), "/list", "/load 3", "/load 2", "/load 9", session=Session()
    )
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DAY", text)
    assert "  2  DAY  Why is the sky is the sky is the sky is the sky …\n" in text
    assert "  3  DAY  How far is the moon?\n" in text
    assert "older.jsonl:2messages>Howfaristhemoon?Far." in "".join(text.split())
    # Of a longer one the last two turns.
    assert text.rstrip().endswith("6 messages\n> And green?\nNo.\n> Red?\nAt dusk.")
    assert len(conversation.session.messages) == 6
    assert "error: there is no conversation 9; /list shows those that there are" in capsys.readouterr().err


def test_without_saved_conversations_the_list_says_so() -> None:
    text, _, _ = chatting(TalkingModel(), "/list", session=Session())
    assert text.endswith("no conversation is saved yet")


@pytest.mark.parametrize("leave", ["/quit", "/exit", "/bye", "/q"])
def test_ways_to_leave(leave: str) -> None:
    _, _, reader = chatting(TalkingModel(), leave, "never read")
    assert reader.texts == ["never read"]


def test_what_was_typed_ahead_of_a_stop_is_dropped() -> None:
    _, _, reader = chatting(Interrupted(10, ANSWER, "\n</think>\n\nNext."), "Count.", "Go on.")
    assert reader.dropped == 1


def test_where_nothing_can_be_saved_the_chat_begins_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/dev/null/nowhere")
    notes: list[str] = []
    assert Session.begin(notes.append).path is None
    assert "this conversation is not saved, /save FILE writes it" in notes[0]
    Editor(data_directory() / "history", [], notes.append)
    assert "messages of this chat are not there to be recalled" in notes[1]


def test_errors_leave_the_chat_going(capsys: pytest.CaptureFixture[str]) -> None:
    class Once(TalkingModel):
        failed = False

        def reserve(self, context: int) -> None:
            if not self.failed:
                self.failed = True
                raise MemoryPlanError("no room")

    _, conversation, reader = chatting(
        Once("\n</think>\n\nYes."), "/nothing", KeyboardInterrupt, "Go.", "/etc/hosts is a file?", " "
    )
    err = capsys.readouterr().err
    assert "error: there is no command /nothing; /help lists them" in err and "error: no room" in err
    assert [m["content"] for m in conversation.session.messages] == ["/etc/hosts is a file?", "Yes."]
    # What could not be sent stands at the prompt again.
    assert reader.defaults == ["", "", "", "Go.", "", ""]


def test_stopped_on_a_terminal_the_chat_goes_on() -> None:
    text, conversation, _ = chatting(Interrupted(10, ANSWER, "\n</think>\n\nNext."), "Count.", "Go on.")
    assert "\nstopped\n" in text and text.count("tok/s") == 2 and "Next." in text
    assert len(conversation.session.messages) == 4


# Drawing


def test_calls_and_results_cannot_steer_the_terminal_and_hide_nothing() -> None:
    screen = Screen()
    view = TerminalView(screen.console)
    view.call(ToolCall("shell", {"command": "ls \x1b[8m; rm\u202e x\nline two", "deep": {"a": [1]}}, ""))
    view.call(ToolCall("now", {}, ""))
    view.result("a\x1b[2Jb\n" + "x" * 200 + "\n" + "\n".join(map(str, range(20))))
    view.result("")
    lines = screen.text.split("\n")
    assert lines[:5] == [
        "╭─ shell ──────────╮",
        "│ command:         │",
        "│ ls ␛[8m; rm\ufffd x   │",
        "│ line two         │",
        '│ deep: {"a": [1]} │',
    ]
    assert lines[6:9] == ["╭─ now ────────╮", "│ no arguments │", "╰──────────────╯"]
    assert lines[9:11] == ["  a␛[2Jb", "  " + "x" * 78]
    assert "  … 16 more lines" in lines


def test_a_long_thought_shows_its_end_and_folds() -> None:
    screen = Screen(height=12)
    view = TerminalView(screen.console)
    seen = []
    for i in range(200):
        view.show(Thinking(f"line {i} " + "words " * (i % 20) + "\n"))
        view._answer._due = 0  # draw at once
        seen.append(screen.text)
    assert all(len(text.split("\n")) <= 9 and text.startswith("Thinking") for text in seen)
    assert "line 199" in seen[-1] and "line 190" not in seen[-1]
    view.show(Text("Done."))
    view.end_answer()
    assert screen.text == "Thought for 1 s (/think shows it)\n\nDone."


def test_text_goes_on_after_what_was_no_call() -> None:
    text, conversation, _ = chatting(
        TalkingModel("\n</think>\n\nOne.\n\n<tool_call>\n<function=\n</tool_call>\n\nTwo."), "Go."
    )
    assert "One.\n" in text and "Two." in text and "<function=" in text
    assert (
        conversation.session.messages[1]["content"] == "One.\n\n<tool_call>\n<function=\n</tool_call>\n\nTwo."
    )


# As processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("chat")
    make_checkpoint.write_checkpoint(base / "checkpoint")
    convert(base / "checkpoint", base / "model", q_bits=4)
    return base / "model"


COMMAND = [sys.executable, "-m", "mlx_flashmoe", "chat"]
NO_THINKING = ["--chat-template-config", '{"enable_thinking": false}']


def environment() -> dict[str, str]:
    return {**os.environ, "MLX_DISABLE_COMPILE": "1", "TERM": "xterm-256color"}


def test_a_pipe_gets_plain_answers(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text("")
    done = subprocess.run(
        [*COMMAND, "--model", folder, "--max-tokens", "9", "--resume", file, *NO_THINKING],
        input="Hi\n/stats\nand\\\nmore\n",
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert [m["role"] for m in answers] == ["user", "assistant"] * 2
    assert answers[2]["content"] == "and\nmore"
    assert done.stdout == "".join(m["content"] + "\n" for m in answers if m["role"] == "assistant")
    assert "\x1b" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert " + kept prompts 1 GB + " in done.stderr and done.stderr.count("tok/s · prompt") == 2
    assert not (tmp_path / "data").exists()


def test_what_goes_wrong_in_a_pipe_is_one_line_and_status_2(folder: Path, tmp_path: Path) -> None:
    def failing(*arguments: str | Path) -> str:
        done = subprocess.run(
            [*COMMAND, *arguments],
            input="/no\n",
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
        )
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert failing("--model", folder) == "error: there is no command /no; /help lists them"
    assert failing("--model", "x", "--allow", "ls").startswith("error: --allow says which shell commands")
    assert failing("--model", "x", "--resume").endswith("there is no conversation to resume yet")
    assert failing("--model", "x", "--prefix-disk", "much").startswith(
        "error: --prefix-disk 'much' is not a size;"
    )


def test_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\n\ntwo\\\nthree\nfour\\"))
    reader, lines = Lines(), []
    with pytest.raises(EOFError):
        while True:
            lines.append(reader.read())
    assert lines == ["one", "", "two\nthree", "four\n"]
    assert not reader.ask("Run it?")


class Terminal:
    """A chat in a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str | Path, program: list[str] = COMMAND, **variables: str) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            ["sh", "-c", 'stty cols 80 rows 24; exec "$0" "$@"', *program, *arguments],
            env={**environment(), **variables},
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C typed there is a signal
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Until the pattern comes in what was not waited for yet."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"{pattern} did not come: {self.text[-2000:]!r}"
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    data = os.read(self.ours, 65536)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"{pattern} did not come before the end: {self.text[-2000:]!r}"
                plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]", "", data.decode(errors="replace"))
                self.text += plain
                if "\x1b[6n" in data.decode(errors="replace"):  # where is the cursor?
                    self.type("\x1b[1;1R")
        self.text = self.text[match.end() :]

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


def test_what_is_typed_ahead_is_sent_in_turn(folder: Path, tmp_path: Path) -> None:
    terminal = Terminal("--model", folder, "--max-tokens", "30", *NO_THINKING)
    time.sleep(0.5)
    terminal.type("one\rtwo\x1b\rlines\r/stats\r")  # while the model is loaded, and then answers
    terminal.wait_for("Ctrl-C stops an answer")
    for shown in (r"> one\s", "tok/s", r"> two\s+lines\s", "tok/s", "/stats", r"messages +4"):
        terminal.wait_for(shown)
    terminal.wait_for(">")
    terminal.type("\x1b[200~pasted\rlines\x1b[201~\r")
    terminal.wait_for("tok/s")
    terminal.wait_for(">")
    terminal.type("/bye\r")
    assert terminal.process.wait(30) == 0
    (file,) = (tmp_path / "data" / "mlx-flashmoe" / "sessions").iterdir()
    said = [m["content"] for m in map(json.loads, file.read_text().splitlines()) if m["role"] == "user"]
    assert said == ["one", "two\nlines", "pasted\nlines"]
    modes = termios.tcgetattr(terminal.ours)
    assert modes[0] & termios.ICRNL and modes[3] & termios.ECHO and modes[3] & termios.ICANON  # as they were


QUESTIONS = """
import sys, time
from pathlib import Path
from mlx_flashmoe.chat.editor import message_reader
with message_reader(Path(sys.argv[1]), [], print) as reader:
    print("BEGUN", flush=True)
    time.sleep(1)
    print("MESSAGE", repr(reader.read()))
    print("ALLOWED", reader.ask("Run it?"))
    print("TOLD", reader.lend(lambda: print("tool:", flush=True) or input())())
    print("MESSAGE", repr(reader.read()), repr(reader.read()))
"""


def test_what_was_typed_before_a_question_is_no_answer_to_it(tmp_path: Path) -> None:
    terminal = Terminal(program=[sys.executable, "-c", QUESTIONS, str(tmp_path / "history")])
    terminal.wait_for("BEGUN")
    terminal.type("one\ry\rand ")
    terminal.wait_for("MESSAGE 'one'")
    terminal.wait_for(r"Run it\? \[y/N\]")
    time.sleep(0.5)
    terminal.type("n\r")
    terminal.wait_for("ALLOWED False")
    terminal.wait_for("tool:")
    terminal.type("said\r")
    terminal.wait_for("TOLD said")
    terminal.type("more\r")
    terminal.wait_for("MESSAGE 'y' 'and more'")
    assert terminal.process.wait(30) == 0


def test_a_terminal_that_can_do_nothing_shows_a_prompt(folder: Path) -> None:
    terminal = Terminal("--model", folder, "--max-tokens", "5", *NO_THINKING, TERM="dumb")
    terminal.wait_for("> ")
    terminal.type("one\r")
    terminal.wait_for("> ")
    terminal.type("/nothing\r")
    terminal.wait_for("> ")
    terminal.type("/q\r")
    assert terminal.process.wait(30) == 0


def test_a_pipe_that_is_not_text_is_one_line(folder: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--model", folder], input=b"caf\xe9\n", capture_output=True, env=environment(), timeout=120
    )
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.splitlines()[-1].startswith(b"error: standard input is not UTF-8: ")


def test_a_chat_that_is_terminated_leaves_the_terminal_as_it_was(folder: Path) -> None:
    terminal = Terminal("--model", folder, *NO_THINKING)
    terminal.wait_for("Ctrl-C stops an answer")
    terminal.wait_for(">")
    terminal.type("one\r")
    terminal.wait_for(r"one\s+\w")  # the answer has begun, and keys are not shown
    assert not termios.tcgetattr(terminal.ours)[3] & termios.ECHO
    terminal.process.terminate()
    assert terminal.process.wait(30) == 128 + signal.SIGTERM
    assert termios.tcgetattr(terminal.ours)[3] & termios.ECHO


def test_a_chat_in_a_terminal(folder: Path, tmp_path: Path) -> None:
    terminal = Terminal("--model", folder, *NO_THINKING)
    terminal.wait_for("Ctrl-C stops an answer")
    terminal.wait_for(">")
    terminal.type("one\x1b\rtwo\r")  # Alt-Enter between them
    terminal.wait_for(r"two\s+\w")  # the answer has begun
    terminal.type("\x03")
    terminal.wait_for("tok/s")
    terminal.wait_for("stopped")
    terminal.wait_for(">")
    terminal.type("/stats\r")
    terminal.wait_for(r"messages +2")
    terminal.wait_for(">")
    terminal.type("\x03\x04")
    assert terminal.process.wait(30) == 0
    (file,) = (tmp_path / "data" / "mlx-flashmoe" / "sessions").iterdir()
    said = [json.loads(line) for line in file.read_text().splitlines()]
    assert said[0] == {"role": "user", "content": "one\ntwo"} and said[1]["content"]

    again = Terminal("--model", folder, "--resume", "--max-tokens", "5", *NO_THINKING)
    again.wait_for(r"2 messages\s+> one two\s")
    again.wait_for(">")
    again.type("three\r")
    again.wait_for("tok/s")  # and from disk came what was said before
    again.wait_for(">")
    again.type("/stats\r")
    again.wait_for(r"prompts +(\d+) tokens, [1-9]\d* of them kept")
    again.wait_for(">")
    again.type("/quit\r")
    assert again.process.wait(30) == 0
    assert len(file.read_text().splitlines()) == 4
