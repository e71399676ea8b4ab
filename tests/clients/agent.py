"""An agent's model that is a script: it reads a file with the client's own tool, and tells the code word in it.

The script knows nothing of the APIs: it sees the prompt as the published chat template renders it, and writes what a
model of that family writes. What it says depends on what was asked last:

    Read the file NAME and tell me the code word       a call of the client's tool, then the word that it gave
    Replace the code word in NAME with WORD            the whole file with the word in it
    What was the code word?                            the word, if the conversation so far has it
    Call NAME with {…}                                 that call, then that it is done

Clients also ask on the side, without tools, for titles and commit messages: they get short ones.
"""

from __future__ import annotations

import json
import re
from typing import Any

READ = "Read the file {} and tell me the code word"
REPLACE = "Replace the code word in {} with {}"
AGAIN = "What was the code word?"
CALL = "Call {} with {}"
DONE = "It is called."
UNKNOWN = "I do not know the code word."

_READ = re.compile(r"Read the file (\S+) and tell me the code word")
_REPLACE = re.compile(r"Replace the code word in (\S+) with ([a-z]+-\d+)")
_AGAIN = re.compile(re.escape(AGAIN))
_CALL = re.compile(r"Call (\w+) with (\{[^{}\n]*\})")
_WORD = re.compile(r"code word (?:is|was) ([a-z]+-\d+)")

# Names of tools that read a file or run a command, the best first.
_READERS = ("read", "readfile", "viewfile", "execcommand", "shellcommand", "shell", "bash")
_PATHS = {"filepath", "absolutepath", "path"}
_COMMANDS = {"cmd", "command"}


def answer(prompt: str) -> str:
    """What the model writes after a prompt, thinking included where the prompt opens it."""
    said = _answer(prompt)
    return f"The user asks for something.\n</think>\n\n{said}" if prompt.endswith("<think>\n") else said


def _answer(prompt: str) -> str:
    functions = _functions(prompt)
    if not functions and (said := _aside(prompt)) is not None:
        return said
    orders = [_last(pattern, prompt) for pattern in (_READ, _REPLACE, _AGAIN, _CALL)]
    order = max((match for match in orders if match), key=lambda match: match.end(), default=None)
    if order is None:
        return "Nothing to do."
    new = "<tool_response>" not in prompt[order.end() :]
    if order.re is _AGAIN:
        return _tell(prompt, "You had me read it: the code word was {}.")
    if order.re is _REPLACE:
        return _edit(order[1], order[2])
    if order.re is _CALL:
        return _tags(order[1], json.loads(order[2])) if new else DONE
    call = _call(functions, order[1])
    return call if call is not None and new else _tell(prompt, "The code word is {}.")


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return max(pattern.finditer(text), key=lambda match: match.start(), default=None)


def _aside(prompt: str) -> str | None:
    """Answers to what clients ask on the side, without tools; None for anything else."""
    instructions = prompt.partition("<|im_end|>")[0]
    if "commit message" in instructions:
        return "Change the code word"
    if "title" in instructions:
        return json.dumps({"title": "A code word"}) if "JSON" in instructions else "A code word"
    return None


def _tell(prompt: str, sentence: str) -> str:
    word = _last(_WORD, prompt)
    return UNKNOWN if word is None else sentence.format(word[1])


def _edit(name: str, word: str) -> str:
    """The whole file as it should be, the form that aider asks for where it does not know a model."""
    return f"{name}\n```\nThe code word is {word}.\n```"


def _functions(prompt: str) -> dict[str, dict[str, Any]]:
    """The functions that the prompt offers, one JSON object a line of its first message, by plain name."""
    functions = {}
    for line in prompt.partition("<|im_end|>")[0].splitlines():
        try:
            tool = json.loads(line)
        except ValueError:
            continue
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if "name" in function:
            functions[_plain(function["name"])] = function
    return functions


def _call(functions: dict[str, dict[str, Any]], path: str) -> str | None:
    """The call that reads a file; None if none of the functions can."""
    for name in _READERS:
        if name in functions and (arguments := _arguments(functions[name], path)) is not None:
            return _tags(functions[name]["name"], arguments)
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _arguments(function: dict[str, Any], path: str) -> dict[str, Any] | None:
    """Arguments of a call by the names in its schema; None if the schema has no place for a path or a command."""
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties", {})
    for name, schema in properties.items():
        if _plain(name) in _PATHS:
            main = {name: path}
        elif _plain(name) in _COMMANDS:
            main = {name: ["cat", path] if schema.get("type") == "array" else f"cat {path}"}
        else:
            continue
        others = set(parameters.get("required", [])) - {name}
        return {**{n: "To find the code word" for n in sorted(others)}, **main}
    return None


def _tags(name: str, arguments: dict[str, Any]) -> str:
    """A call as Qwen3.5 writes it."""
    values = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"
