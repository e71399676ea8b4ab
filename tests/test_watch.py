"""While something goes on: memory that gets short is told, in time and in one line, and a Mac stays awake."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from fakes import TalkingModel, make_checkpoint
from fakes import tokenizer as fake_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import MofNCompleteColumn, TextColumn
from screen import Screen

from mlx_flashmoe import cli, convert, system, watch
from mlx_flashmoe.chat.conversation import Conversation
from mlx_flashmoe.chat.session import Session
from mlx_flashmoe.chat.view import TerminalView
from mlx_flashmoe.server.metrics import Metrics
from mlx_flashmoe.server.worker import End, Job, Worker
from mlx_flashmoe.terminal.answer import TerminalAnswer
from mlx_flashmoe.terminal.bars import Bar
from mlx_flashmoe.terminal.region import print_above
from mlx_flashmoe.watch import MemoryWatch

LEVEL = {"normal": 1, "warning": 2, "critical": 4}


@pytest.fixture
def pressure(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the pressure that macOS would report."""
    settings = {"kern.memorystatus_vm_pressure_level": 1}
    monkeypatch.setattr(system, "sysctl", settings.get)
    monkeypatch.setattr(watch, "PressureGauge", system.PressureGauge)
    monkeypatch.setattr(watch, "available_memory", lambda: 900 * 10**6)
    return lambda level: settings.update({"kern.memorystatus_vm_pressure_level": LEVEL[level]})


LINE = (
    "warning: the system is short of memory, 900 MB are left: close other programs, or start again with less "
    "--expert-memory"
)


def test_a_shortage_is_told_once(pressure: Callable[[str], None]) -> None:
    told: list[str] = []
    now = 0.0
    watch = MemoryWatch(told.append, clock=lambda: now)
    for seconds, level, lines in (
        (0, "normal", 0),
        (5, "warning", 1),
        (10, "critical", 1),
        (15, "normal", 1),
        (65, "warning", 1),  # the same shortage: it was there less than a minute ago
        (125, "normal", 1),
        (130, "critical", 2),
        (500, "normal", 2),
        (505, "warning", 3),
    ):
        now = seconds
        pressure(level)
        watch.look()
        assert len(told) == lines, seconds
    assert told == [LINE, LINE.replace("short", "very short"), LINE]


def test_it_looks_at_once_and_again_and_ends_with_what_it_watches(
    pressure: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()
    watch = MemoryWatch(lambda line: told.set())
    monkeypatch.setattr(MemoryWatch, "EVERY", 0.01)
    with watch:
        time.sleep(0.02)
        assert not told.is_set()
        pressure("warning")
        assert told.wait(60)
    told.clear()
    watch._short_at = None
    monkeypatch.setattr(MemoryWatch, "EVERY", 600)
    with watch:
        assert told.wait(60)
    assert not any(thread.name == "memory-watch" for thread in threading.enumerate())


def test_figures_that_cannot_be_had_end_nothing_but_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = MemoryWatch(print)

    def gone() -> Any:
        raise OSError("no /proc")

    watch._gauge = gone
    with watch:
        pass


# What is drawn meanwhile


@given(
    pieces=st.lists(st.text("ab *\n#`-", max_size=12), max_size=20),
    notes=st.sets(st.integers(0, 20), max_size=4),
    width=st.sampled_from([20, 80]),
)
def test_notes_in_between_leave_what_is_drawn_as_it_was(
    pieces: list[str], notes: set[int], width: int
) -> None:
    """In rows of their own: without them the screen is the same."""

    def shown(notes: set[int]) -> list[str]:
        screen = Screen(width=width)
        answer = TerminalAnswer(screen.console, clock=iter(range(0, 10**9, 100)).__next__)
        view = TerminalView(screen.console)
        for number, piece in enumerate(pieces):
            if number in notes:
                view.note(f"<note {number}>")
            answer.feed(piece)
        answer.close()
        assert screen.cursor
        return screen.text.split("\n")

    with_notes = shown(notes)
    assert [row for row in with_notes if row.startswith("<")] == [
        f"<note {n}>" for n in sorted(notes) if n < len(pieces)
    ]
    assert [row for row in with_notes if row and row[0] != "<"] == [row for row in shown(set()) if row]


def test_a_bar_that_a_thread_draws_lets_notes_of_another_through(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(Bar, "EVERY", 0.0005)
    bar = Bar(TextColumn("Loading"), MofNCompleteColumn(), console=screen.console, delay=0)
    for number in range(100):
        bar(number, 100)
        print_above(lambda number=number: screen.console.print(f"<note {number}>"))  # type: ignore[misc]
        time.sleep(0.001)
    bar.close()
    assert screen.text.split("\n") == [f"<note {number}>" for number in range(100)]


def test_a_chat_tells_it_above_the_answer_that_is_drawn(
    pressure: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryWatch, "EVERY", 0.01)
    screen = Screen(width=200)
    view = TerminalView(screen.console)
    show, said = view.show, ""

    def short(event: Any) -> None:
        nonlocal said
        show(event)
        said += event.text
        if said.endswith("second paragraph"):
            pressure("warning")
            deadline = time.monotonic() + 60
            while LINE not in screen.text and time.monotonic() < deadline:
                time.sleep(0.01)

    view.show = short  # type: ignore[method-assign]
    model = TalkingModel(
        "\n</think>\n\nThe first.\n\nA second paragraph, and its end.", "\n</think>\n\nMore."
    )
    conversation = Conversation(model, fake_tokenizer(), Session(), view)
    conversation.say("Hi")
    conversation.say("Go on")
    rows = [row for row in screen.text.split("\n") if row and " tok/s" not in row]
    assert rows.count(LINE) == 1 and rows.index(LINE) < rows.index("A second paragraph, and its end.")
    rows.remove(LINE)
    assert rows == ["The first.", "A second paragraph, and its end.", "More."]


# Commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint.write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "model"
    convert(checkpoint, folder, q_bits=4)
    return folder


@pytest.fixture
def awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What went on with a program called caffeinate, in order."""
    program = tmp_path / "bin" / "caffeinate"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(system, "on_mac", lambda: True)
    monkeypatch.setattr(cli, "check_processor", lambda: None)
    events: list[str] = []
    spawn, wait = os.posix_spawnp, os.waitpid

    def spawned(file: str, *rest: Any, **options: Any) -> int:
        events.append("began")
        return spawn(file, *rest, **options)

    def waited(pid: int, options: int) -> tuple[int, int]:
        result = wait(pid, options)
        events.append("ended")
        return result

    monkeypatch.setattr(os, "posix_spawnp", spawned)
    monkeypatch.setattr(os, "waitpid", waited)
    return events


def arguments(command: str, checkpoint: Path, model: Path, folder: Path) -> list[str]:
    (folder / "text").write_text(make_checkpoint.TEXT[:100])
    return {
        "convert": ["convert", "--hf-path", str(checkpoint), "--mlx-path", str(folder / "made")],
        "verify": ["verify", "--model", str(model)],
        "generate": ["generate", "--model", str(model), "--prompt", "Hi", "--max-tokens", "2"],
        "eval": ["eval", "--model", str(model), "--text", str(folder / "text")],
        "bench": ["bench", "--model", str(model), "--prompts", "4", "--tokens", "2"],
    }[command]


@pytest.mark.parametrize("command", ["convert", "verify", "generate", "eval", "bench"])
def test_commands_that_take_long_keep_a_mac_awake_until_they_end(
    command: str,
    checkpoint: Path,
    model: Path,
    awake: list[str],
    pressure: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(arguments(command, checkpoint, model, tmp_path)) == 0
    assert awake == ["began", "ended"]
    # So it is if they fail.
    failing = arguments(command, tmp_path, tmp_path, tmp_path)
    assert cli.main(failing) == 2
    assert awake == ["began", "ended"] * 2
    capsys.readouterr()


@pytest.mark.parametrize("command", ["generate", "eval", "bench"])
def test_commands_that_run_a_model_tell_of_a_shortage(
    command: str,
    checkpoint: Path,
    model: Path,
    pressure: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pressure("warning")
    assert cli.main(arguments(command, checkpoint, model, tmp_path)) == 0
    assert capsys.readouterr().err.splitlines().count(LINE) == 1


def test_serve_tells_of_a_shortage_in_its_log(
    model: Path,
    pressure: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mlx_flashmoe.server.app._Server.run", lambda self, sockets: None)
    pressure("critical")
    assert cli.main(["serve", "--model", str(model), "--port", "0"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines.count(LINE.replace("short", "very short")) == 1


def test_before_a_model_runs_an_error_is_all_that_is_said(
    pressure: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pressure("critical")
    for command in ("generate", "eval", "bench", "serve"):
        more = {"generate": ["--prompt", "Hi"], "eval": ["--text", __file__]}.get(command, [])
        assert cli.main([command, "--model", str(tmp_path), *more]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_chat_and_a_server_keep_a_mac_awake_while_they_answer(
    awake: list[str], pressure: Callable[[str], None]
) -> None:
    model = TalkingModel(*["\n</think>\n\nYes."] * 4)
    conversation = Conversation(model, fake_tokenizer(), Session(), TerminalView(Screen().console))
    assert awake == []
    for count in (1, 2):
        conversation.say("Well?")
        assert awake == ["began", "ended"] * count

    awake.clear()
    worker = Worker(lambda: (TalkingModel("\n</think>\n\nYes."), fake_tokenizer()), 1, Metrics())
    worker.start()
    ended = threading.Event()
    prompt = fake_tokenizer().apply_chat_template([{"role": "user", "content": "Well?"}])
    job = Job(prompt, 3, lambda logits: mx.argmax(logits, -1), [])
    job.emit = lambda part: ended.set() if isinstance(part, End) else None
    assert awake == [] and worker.submit(job) and ended.wait(60)
    worker.close()
    assert awake == ["began", "ended"]
