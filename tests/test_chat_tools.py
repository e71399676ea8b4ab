"""Functions and the shell as tools: what the model is told of them, what it may do, and what comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flashmoe.chat.functions import MAX_RESULT, from_function, load_functions, run, shorten
from mlx_flashmoe.chat.shell import MAX_OUTPUT, is_allowed, run_command, shell_tool
from mlx_flashmoe.errors import RequestError

# Python functions


def forecast(
    place: str, days: int = 1, *, unit: Literal["C", "F"] = "C", tags: list[str] | None = None
) -> dict[str, Any]:
    """The weather forecast.

    It may be wrong.

    Args:
        place: a town,
            with its country.
        days (int): how many days ahead.

    Returns:
        temperatures: by day.
    """
    return {"place": place, "days": days, "unit": unit, "tags": tags}


def test_a_schema_is_made_of_hints_and_docstring() -> None:
    assert from_function(forecast, "f.py").schema == {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "The weather forecast.\n\nIt may be wrong.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "a town, with its country."},
                    "days": {"type": "integer", "description": "how many days ahead."},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                },
                "required": ["place"],
            },
        },
    }


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (list, {"type": "array"}),
        (list[list[int]], {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        (dict, {"type": "object"}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (Optional[int], {"type": ["integer", "null"]}),  # noqa: UP045 - people write it so
        (int | str | None, {"type": ["integer", "string", "null"]}),
        (Literal[1, 2], {"type": "integer", "enum": [1, 2]}),
        (Literal["all", 1], {"enum": ["all", 1]}),
        (Any, {}),
    ],
)
def test_types(hint: Any, schema: dict[str, Any]) -> None:
    def f(x):
        """Does."""

    f.__annotations__ = {"x": hint}
    assert from_function(f, "f.py").schema["function"]["parameters"]["properties"] == {"x": schema}


BROKEN = {
    "def f(x: int): ...": "f has no docstring",
    "def f(x):\n    'Does.'": "parameter x has no type hint",
    "def f(x: bytes):\n    'Does.'": "parameter x is bytes",
    "def f(x: dict[int, str]):\n    'Does.'": "parameter x is dict[int, str]",
    "def f(x: list[set]):\n    'Does.'": "parameter x is list[set]",
    "def f(x: int | bytes):\n    'Does.'": "parameter x is int | bytes",
    "def f(*x: int):\n    'Does.'": "cannot be given by name",
    "def f(x: 'Nowhere'):\n    'Does.'": "its type hints cannot be read: name 'Nowhere'",
    "def f(x: int):\n    '''Does.\n\n    Args:\n        y: no.\n    '''": "tells of y",
    "async def f(x: int):\n    'Does.'": "f is async",
    "def _f(x: int):\n    'Does.'": "defines no function",
    "from os.path import join": "defines no function",
    "1 / 0": "cannot be imported: ZeroDivisionError",
    "import sys; sys.exit('not here')": "cannot be imported: SystemExit: not here",
    "def f(": "cannot be imported: SyntaxError",
}


@pytest.mark.parametrize("source", BROKEN)
def test_what_cannot_be_a_tool_is_refused_by_name(tmp_path: Path, source: str) -> None:
    file = tmp_path / "tools.py"
    file.write_text(source)
    with pytest.raises(RequestError) as error:
        load_functions(file)
    assert str(error.value).startswith(f"--tools {file}: ") and BROKEN[source] in str(error.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tools.txt").write_text("def f(x: int): 'Does.'")
    for name, reason in (("nothing.py", "there is no such file"), ("tools.txt", "is not a Python file")):
        with pytest.raises(RequestError, match=reason):
            load_functions(tmp_path / name)


def test_calls_come_back_as_text_whatever_happens(capsys: pytest.CaptureFixture[str]) -> None:
    def text(x: str) -> str:
        """Gives x."""
        print("in the tool")
        return x

    def fail(x: int = 0) -> None:
        """Fails."""
        raise (ValueError("no"), SystemExit("leaving"))[x]

    functions = {f.name: f for f in (from_function(g, "f.py") for g in (text, fail, forecast))}
    assert run(functions, "text", {"x": "ä\n"}) == "ä\n"
    assert capsys.readouterr() == ("", "in the tool\n")
    assert run(functions, "forecast", {"place": "Zürich"}) == (
        '{"place": "Zürich", "days": 1, "unit": "C", "tags": null}'
    )
    assert run(functions, "text", {"x": os.fsdecode(b"caf\xe9.txt")}) == "caf?.txt"
    assert run(functions, "fail", {}) == "Error: ValueError: no"
    assert run(functions, "fail", {"x": 1}) == "Error: SystemExit: leaving"
    assert run(functions, "text", {"y": 1}) == "Error: text: missing a required argument: 'x'"
    assert run(functions, "txt", {}) == "Error: there is no tool 'txt'; there are: text, fail, forecast"
    long = run(functions, "text", {"x": "a" * 30_000 + "b" * 30_000})
    assert len(long) < MAX_RESULT + 100 and "a\n… 40000 characters left out …\nb" in long


@given(st.text(), st.integers(2, 50))
def test_a_shortened_text_has_its_ends(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert short == text if len(text) <= limit else len(short) < limit + 60
    assert short[: limit // 2] == text[: limit // 2] and short[-(limit // 2) :] == text[-(limit // 2) :]


# The shell


@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        ("ls", True),
        ("ls -la /tmp", True),
        ("  ls  'a b'", True),
        ("git diff --stat", True),
        ("git diff", True),
        ("git", False),
        ("git difftool", False),
        ("git status", False),
        ("lsof", False),
        ("ls; rm -rf /", False),
        ("ls;rm -rf /", False),
        ("ls\nrm -rf /", False),
        ("ls\rrm", False),
        ("ls && rm x", False),
        ("ls || rm x", False),
        ("ls & rm x", False),
        ("ls | sh", False),
        ("ls > /etc/passwd", False),
        ("ls < x", False),
        ("ls $(rm x)", False),
        ("ls `rm x`", False),
        ("ls ${IFS}x", False),
        ("ls *", False),
        ("ls ~", False),
        ("ls {a,b}", False),
        ("ls 'a;b'", False),  # harmless, but who would know at a glance
        ("ls 'unclosed", False),
        ("X=1 ls", False),
        ("./ls", False),
        ("/bin/ls", False),
        ("", False),
        ("ls \u202eevil", False),
        ("ls \x1b[2J", False),
    ],
)
def test_what_is_run_without_asking(command: str, allowed: bool) -> None:
    assert is_allowed(command, ["ls", "git  diff", ""]) is allowed
    assert not is_allowed(command, [])
    assert not is_allowed(command, ["'unclosed"])


@given(st.text(alphabet="ls git;&|$`\\'\"\n><(){}*?~#-x", max_size=12))
def test_an_allowed_command_is_plain_words_after_its_prefix(command: str) -> None:
    if is_allowed(command, ["ls"]):
        assert command.split()[0].replace("'", "").replace('"', "") == "ls"
        assert not set(command) & set(";&|$`\\\n><(){}*?~#")


def test_a_program_gives_output_and_status() -> None:
    assert run_command(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]) == "out\nerr\n[exit status 3]"
    assert run_command(["/bin/sh", "-c", "kill -9 $$"]) == "[ended by signal 9]"
    assert run_command(["true"]) == ""
    assert run_command(["cat"]) == ""  # there is no input to wait for
    assert run_command(["printf", r"\377\n"]) == "\ufffd"
    assert "No such file" in run_command(["no-such-program"])


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().split(") ")[1][0] != "Z"


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(pid)


def test_what_takes_too_long_or_says_too_much_is_killed() -> None:
    started = time.monotonic()
    said = run_command(["/bin/sh", "-c", "sleep 60 & echo $!; wait"], seconds=0.3)
    assert said.endswith("\n[stopped after 0 seconds]") and gone(int(said.split()[0]))
    # What a command leaves running in the background holds its output open.
    said = run_command(["/bin/sh", "-c", "sleep 60 & echo $!"], seconds=0.3)
    assert gone(int(said.split()[0]))
    # It may have closed its output and go on.
    assert (
        run_command(["/bin/sh", "-c", "exec >&- 2>&-; sleep 60"], seconds=0.3) == "[stopped after 0 seconds]"
    )
    flood = run_command(["yes"])
    assert flood.endswith(f"\n[stopped after {MAX_OUTPUT} bytes of output]") and len(flood) < 2 * MAX_OUTPUT
    assert time.monotonic() - started < 20


def test_an_interrupted_command_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_command(["/bin/sh", "-c", f"echo $$ > {file}; sleep 60"])
    timer.join()
    assert gone(int(file.read_text()))


def test_the_shell_asks_unless_the_command_is_allowed(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(command: str) -> bool:
        asked.append(command)
        return "yes" in command

    functions = {"shell": shell_tool(["echo", "printf"], ask)}

    def shell(command: str) -> str:
        return run(functions, "shell", {"command": command})

    assert shell("echo plain 'words here'") == "plain words here" and asked == []
    assert shell("echo yes; echo no") == "yes\nno" and asked == ["echo yes; echo no"]
    assert shell(f"touch {tmp_path}/file") == "The user did not allow this command."
    assert not (tmp_path / "file").exists()
    assert shell(" ") == "Error: ValueError: the command is empty"
    assert shell("printf a%sb x") == "axb"
