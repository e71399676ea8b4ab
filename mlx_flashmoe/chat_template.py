"""A checkpoint's chat template: a Jinja program that writes a conversation as the model was trained to see it.

Templates are programs of other parties: they run in Jinja's sandbox on plain data. Many refuse conversations that
clients send all the same (a system message in the middle, no user message): :func:`fit` rewrites those, as far as
the template needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlx_flashmoe.errors import RequestError

if TYPE_CHECKING:
    import jinja2

Message = dict[str, Any]

REMINDER = "<system-reminder>\n{}\n</system-reminder>"
"""A system message where the template has no place for one. Agents' models know the tag from their clients."""


class ChatTemplate:
    """One template.

    Args:
        source: Jinja.
        special_tokens: variables by name ("bos_token", …) that every template may use.

    Raises:
        RequestError: it is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source)
        except Exception as e:
            raise RequestError(f"the checkpoint's chat template is not valid Jinja: {e}") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        on_text: Callable[[str], str] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation's text.

        Args:
            on_text: is applied to every text in the messages, tools and variables before the template sees it.
            variables: further ones of the template.

        Raises:
            RequestError: the template refuses these messages, or fails on them.
        """
        given = {
            "documents": None,
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            # Plain data only, never objects with methods of their own.
            plain = json.loads(json.dumps(given))
            if on_text is not None:
                plain = map_text(plain, on_text)
            return self._template.render({**self._special_tokens, **plain})
        except Exception as e:  # a template can raise anything
            raise RequestError(f"the chat template cannot render these messages: {e}") from None

    def reads(self, variable: str) -> bool:
        """Returns whether the template looks at a variable."""
        from jinja2.meta import find_undeclared_variables

        return variable in find_undeclared_variables(_environment().parse(self.source))

    def takes(self, *roles: str) -> bool:
        """Returns whether messages of these roles are rendered, each once and in this order."""
        texts = [f"<{i}{i}{i}>" for i in range(len(roles))]
        try:
            text = self.render([{"role": role, "content": t} for role, t in zip(roles, texts)])
        except RequestError:
            return False
        places = [text.find(t) for t in texts]
        return all(p >= 0 for p in places) and places == sorted(places)

    # The template's abilities, found by trying. It does not change as a conversation grows: if it did, a
    # conversation's prompt would no longer begin with the one before, and none of that would be reused.

    @cached_property
    def takes_system(self) -> bool:
        """A system message at the beginning."""
        return self.takes("system", "user")

    @cached_property
    def takes_late_system(self) -> bool:
        """A system message anywhere."""
        return self.takes("user", "assistant", "system", "user", "system")

    @cached_property
    def needs_user(self) -> bool:
        """A conversation without a user message is refused."""
        return not self.takes("system") or not self.takes("system", "assistant")

    @cached_property
    def begins_with_user(self) -> bool:
        """A conversation that the model begins is refused."""
        return self.takes("user", "assistant") and not self.takes("assistant", "user")

    @cached_property
    def alternates(self) -> bool:
        """Two messages of one role in a row are refused."""
        return self.takes("user", "assistant", "user") and not self.takes("user", "user")

    @cached_property
    def takes_objects(self) -> bool:
        """The arguments of calls in the history are objects; else they are JSON texts, as DeepSeek's templates have
        them."""
        shown = self._shown(_call({"<key>": "<value>"}))
        as_text = self._shown(_call('{"<key>": "<value>"}'))
        return as_text is None or (shown is not None and "{'<key>'" not in shown)

    @cached_property
    def shows_ids(self) -> bool:
        """Calls in the history are shown by their ids alone, as Kimi's template does."""
        call = _call({"<key>": "<value>"} if self.takes_objects else '{"<key>": "<value>"}')
        shown = self._shown(call)
        return shown is not None and call["id"] in shown and call["function"]["name"] not in shown

    def _shown(self, call: dict[str, Any]) -> str | None:
        """The text of a conversation with a call; None if it is refused."""
        messages: list[Message] = [
            {"role": "user", "content": "<asked>"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "<result>"},
        ]
        try:
            return self.render(messages)
        except RequestError:
            return None


def _call(arguments: dict[str, str] | str) -> dict[str, Any]:
    return {"type": "function", "id": "<id>", "function": {"name": "<name>", "arguments": arguments}}


def fit_calls(messages: Sequence[Message], template: ChatTemplate) -> list[Message]:
    """The conversation with its calls as the template takes them.

    Where it shows ids alone, they become the ones that Kimi K2 was trained with, functions.NAME:N, calls counted from
    the beginning: clients keep ids that say nothing, or none, and results are then in the order of the calls.
    """
    if not template.shows_ids and template.takes_objects:
        return list(messages)
    out: list[Message] = []
    count = 0
    open_calls: dict[str, str] = {}  # without a result yet: the client's id, or a place -> the template's
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            open_calls, fitted = {}, []
            for place, call in enumerate(calls):
                function = dict(call["function"])
                if template.shows_ids:
                    own = f"functions.{function['name']}:{count}"
                    open_calls[call.get("id") or f"<{place}>"] = own
                    call = {**call, "id": own}
                    count += 1
                if not template.takes_objects and not isinstance(function.get("arguments"), str):
                    function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
                fitted.append({**call, "function": function})
            message = {**message, "tool_calls": fitted}
        elif message.get("role") == "tool" and open_calls:
            answered = message.get("tool_call_id")
            key = answered if answered in open_calls else next(iter(open_calls))
            message = {**message, "tool_call_id": open_calls.pop(key)}
        out.append(message)
    return out


def fit(messages: Iterable[Message], template: ChatTemplate) -> list[Message]:
    """The conversation, rewritten where the template would refuse it; every text stays at its place.

    - Leading system messages become one.
    - A later one stays where the template can render it there. Elsewhere it is appended to the tool's result
      before it, or becomes a user message, as a reminder.
    - A conversation without a user message, or that the model begins, gets an empty one before it, if the template
      needs that.
    - Neighbours of one role become one, if the template needs that.
    """
    out: list[Message] = []
    for message in messages:
        leading = all(m["role"] == "system" for m in out)
        if message["role"] != "system":
            out.append(dict(message))
        elif leading and out:
            out[0]["content"] = _joined(out[0]["content"], message["content"])
        elif leading or template.takes_late_system:
            out.append(dict(message))
        elif not message["content"].strip():
            continue
        elif out[-1]["role"] == "tool":
            # A user message here would end the run of tool calls, and templates drop the thinking of ended ones.
            out[-1]["content"] = _joined(out[-1]["content"], REMINDER.format(message["content"]))
        else:
            out.append({"role": "user", "content": REMINDER.format(message["content"])})
    if out and out[0]["role"] == "system" and not template.takes_system and template.takes("user"):
        out[0] = {"role": "user", "content": REMINDER.format(out[0]["content"])}
    start = int(bool(out) and out[0]["role"] == "system")
    if (template.needs_user and not any(m["role"] == "user" for m in out)) or (
        template.begins_with_user and out[start:] and out[start]["role"] != "user"
    ):
        out.insert(start, {"role": "user", "content": ""})
    return _merged(out) if template.alternates else out


def _merged(messages: list[Message]) -> list[Message]:
    out: list[Message] = []
    for message in messages:
        before = out[-1] if out else None
        if before is not None and before["role"] == message["role"] in ("user", "assistant"):
            out[-1] = {**before, **message, "content": _joined(before["content"], message["content"])}
        else:
            out.append(message)
    return out


def _joined(first: str, second: str) -> str:
    return f"{first}\n\n{second}" if first and second else first or second


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every text in it changed, the keys of objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_text(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): map_text(item, change) for key, item in value.items()}
    return value


def _environment() -> jinja2.Environment:
    """Jinja as chat templates are written for it: sandboxed, with the globals transformers gives them."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """``{% generation %}…{% endgeneration %}`` marks training targets; here it is only its body."""

        tags = {"generation"}  # noqa: RUF012 - Jinja reads it from the class

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PlainNamespace(Namespace):
        """A namespace that stores no underscored names, which the sandbox would not let a template read."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            for name in dict(*args[1:], **kwargs):
                _check(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            _check(name)
            super().__setitem__(name, value)

    def _check(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not store {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own filter escapes HTML and sorts keys; models were trained on neither."""
        text = json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        # A noncharacter parts texts that would read as special tokens (Tokenizer.apply_chat_template): it stays itself.
        return (
            re.sub(r"\\ufd([d-e][0-9a-f])", lambda c: chr(0xFD00 + int(c[1], 16)), text)
            if ensure_ascii
            else text
        )

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        namespace=PlainNamespace,
        dict=make_dict,
    )
    return environment
