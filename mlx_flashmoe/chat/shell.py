"""The shell as a tool: off unless asked for, and every command is asked about unless it is known to be harmless."""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from mlx_flashmoe.chat.functions import Function

SECONDS = 120.0
MAX_OUTPUT = 1_000_000
"""Bytes of output after which a command is stopped."""

# Anything a shell might take for more than the words themselves. A command with one of these is asked about, even
# where it is quoted and means nothing.
_SPECIAL = set(";&|<>()$`\\*?[]{}~!#")


def is_allowed(command: str, prefixes: Sequence[str]) -> bool:
    """Whether a command is one of the allowed ones followed by nothing but plain words.

    Prefixes are compared word by word: "git diff" allows ``git diff --stat``, and neither ``git difftool`` nor
    ``git diff; rm -rf .``. What options an allowed command takes is for the user to know.
    """
    if _SPECIAL & set(command) or not command.isprintable():
        return False
    try:
        words = shlex.split(command)
        starts = [shlex.split(prefix) for prefix in prefixes]
    except ValueError:  # an unclosed quote
        return False
    return any(start and words[: len(start)] == start for start in starts)


def shell_tool(allowed: Sequence[str], ask: Callable[[str], bool]) -> Function:
    """The tool.

    Args:
        allowed: prefixes of commands that are run without asking, see ``is_allowed``.
        ask: shows a command to the user; whether it may run.
    """

    def shell(command: str) -> str:
        if not command.strip():
            raise ValueError("the command is empty")
        if is_allowed(command, allowed):
            return run_command(shlex.split(command))
        if not ask(command):
            return "The user did not allow this command."
        return run_command(["/bin/sh", "-c", command])

    description = (
        f"Run a command with /bin/sh in {os.getcwd()} and get its output. It has no input, and is stopped after "
        f"{SECONDS:.0f} seconds. The user is asked before it runs."
    )
    parameters = {
        "type": "object",
        "properties": {"command": {"type": "string", "description": "the command line"}},
        "required": ["command"],
    }
    inner = {"name": "shell", "description": description, "parameters": parameters}
    return Function({"type": "function", "function": inner}, shell)


def run_command(arguments: Sequence[str], seconds: float = SECONDS) -> str:
    """A program's output, both streams as they came, and its status if it is not 0.

    It and what it has started are killed when it takes too long, says too much, or the caller is interrupted.
    """
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as e:
        return f"Error: {arguments[0]}: {e.strerror}"
    assert process.stdout is not None
    output, ended, whole = b"", "", False
    deadline = time.monotonic() + seconds
    try:
        with process.stdout as stream, selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while len(output) <= MAX_OUTPUT:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                piece = os.read(stream.fileno(), 65536)
                if not piece:
                    break
                output += piece
            else:
                ended = f"[stopped after {MAX_OUTPUT} bytes of output]"
        if not ended:
            status = process.wait(max(0.0, deadline - time.monotonic()))
            whole = True
            if status:
                ended = f"[exit status {status}]" if status > 0 else f"[ended by signal {-status}]"
    except (TimeoutError, subprocess.TimeoutExpired):
        ended = f"[stopped after {seconds:.0f} seconds]"
    finally:
        if not whole:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "\n".join(part for part in (output.decode("utf-8", "replace").rstrip("\n"), ended) if part)
