"""A conversation: the user's message in, the model's answer out, and the tools it calls on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlx_flashmoe.chat.functions import Function, run
from mlx_flashmoe.chat.session import Session
from mlx_flashmoe.chat.settings import Settings
from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.generate import GenerationResponse, answer_room, cut_off, stream_generate
from mlx_flashmoe.system import keep_awake
from mlx_flashmoe.tokenizer import Message, Tokenizer
from mlx_flashmoe.tools import Event, Piece, Thinking, ToolCall, answer_parser, pieces
from mlx_flashmoe.watch import MemoryWatch

ROUNDS = 25
"""Answers in a row that call tools, before the user is asked again."""


class View(Protocol):
    """Shows a conversation while it takes place."""

    def prompt_progress(self, done: int, total: int) -> None: ...

    def show(self, event: Piece) -> None:
        """A piece of the answer. Calls are shown by ``call``, when it is their turn."""
        ...

    def writing_call(self) -> None:
        """The model is writing a call, which cannot be shown yet."""
        ...

    def end_answer(self) -> None: ...

    def call(self, call: ToolCall) -> None: ...

    def result(self, text: str) -> None: ...

    def figures(self, figures: Figures) -> None: ...

    def note(self, text: str) -> None:
        """A remark; other threads make some, too, while an answer is shown."""
        ...


@dataclass(frozen=True)
class Figures:
    """Figures of one answer.

    Attributes:
        response: the last step.
        bytes_read, hits, misses: of experts.
        context: tokens of prompt and answer; context_length: the most the model was made for, None if unknown.
    """

    response: GenerationResponse
    bytes_read: int
    hits: int
    misses: int
    context: int
    context_length: int | None


@dataclass
class Answer:
    """The result of one prompt. ``stopped``: by the user."""

    thinking: str = ""
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    response: GenerationResponse | None = None
    stopped: bool = False

    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


class _Stopped(Exception):
    pass


class Conversation:
    """A model, a session, and the tools the model may use.

    Args:
        functions: the tools.
        settings: what the user can change.
        template: further variables for the chat template.
        generation: what else ``stream_generate`` is given.

    Attributes:
        settings: what the user can change.
        session: the messages; may be replaced between turns.
        unsent: a message that was taken back, because nothing came of it.
        stopped: the user has stopped the last turn.
        figures: of each answer so far.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        session: Session,
        view: View,
        functions: Sequence[Function] = (),
        *,
        settings: Settings | None = None,
        template: dict[str, Any] | None = None,
        **generation: Any,
    ):
        self.model = model
        self.settings = settings or Settings()
        self.session = session
        self.functions = {function.name: function for function in functions}
        self.unsent = ""
        self.stopped = False
        self.figures: list[Figures] = []
        self._tokenizer = tokenizer
        self._view = view
        self._watch = MemoryWatch(view.note)
        self._template = template or {}
        self._generation = generation

    @property
    def can_switch_thinking(self) -> bool:
        """The chat template has an ``enable_thinking``."""
        return self._tokenizer.chat_template(self._schemas).reads("enable_thinking")

    @property
    def _schemas(self) -> list[dict[str, Any]]:
        return [function.schema for function in self.functions.values()]

    @property
    def thinking(self) -> str:
        """The model's thinking before its last answer."""
        answers = [m for m in self.session.messages if m["role"] == "assistant"]
        return str(answers[-1].get("reasoning_content", "")) if answers else ""

    def say(self, text: str) -> None:
        """One turn of the user's: answers are shown and tools called until the model is done.

        Ctrl-C stops it: what has been said stays. A message to which nothing was said becomes ``unsent``.

        Raises:
            FlashMoEError: the model could not answer.
        """
        messages = self.session.messages
        before = len(messages)
        self.unsent, self.stopped = "", False
        messages.append({"role": "user", "content": text})
        try:
            for _ in range(ROUNDS):
                answer = self._answer()
                self.stopped = answer.stopped
                if answer.response is None:
                    break
                messages.append(answer.message())
                self._call(answer.calls)
                self._tell(answer)
                if not answer.calls:
                    return
                self.session.save()
                if self.stopped:
                    return
            else:
                self._view.note(f"stopped after {ROUNDS} answers with tool calls; say “continue” for more")
        finally:
            if len(messages) == before + 1:
                messages.pop()
                self.unsent = text
            else:
                self.session.save()

    def _answer(self) -> Answer:
        schemas = self._schemas
        variables = {**self._template, **self.settings.template}
        prompt = self._tokenizer.apply_chat_template(
            self.session.messages, tools=schemas or None, **variables
        )
        max_tokens = self.settings.max_tokens
        try:
            room = answer_room(self.model, len(prompt), max_tokens)
        except RequestError as e:
            raise RequestError(f"the context is full: {e}; /clear begins a new conversation") from None
        self.model.reserve(len(prompt) + (0 if max_tokens == -1 else room))
        parser = answer_parser(self._tokenizer, schemas, prompt)
        answer = Answer()

        def take(events: list[Event]) -> None:
            for event in pieces(events):
                if isinstance(event, ToolCall):
                    answer.calls.append(event)
                elif isinstance(event, Thinking):
                    answer.thinking += event.text
                else:
                    answer.text += event.text
                self._view.show(event)

        stats = self.model.stats()
        with keep_awake(), self._watch, _noting_ctrl_c() as stop_asked:

            def progress(done: int, total: int) -> None:
                self._view.prompt_progress(done, total)
                if stop_asked() and done < total:
                    raise _Stopped

            stream = stream_generate(
                self.model,
                self._tokenizer,
                prompt,
                max_tokens,
                prompt_progress_callback=progress,
                **self.settings.generation,
                **self._generation,
            )
            try:
                with closing(stream):
                    for response in stream:
                        answer.response = response
                        take(parser.feed(response.text, response.token))
                        if parser.in_call:
                            self._view.writing_call()
                        if stop_asked():
                            raise _Stopped
                take(parser.finish())
            except _Stopped:
                # A call that was not finished, or whose answer was not, is not made.
                answer.stopped, answer.calls = True, []
            finally:
                self._view.end_answer()
        if answer.response is not None:
            spent = self.model.stats() - stats
            figures = Figures(
                answer.response,
                spent.bytes_read,
                spent.hits,
                spent.misses,
                len(prompt) + answer.response.generation_tokens,
                self.model.context_length,
            )
            self.figures.append(figures)
        return answer

    def _tell(self, answer: Answer) -> None:
        """Shows the figures of an answer, after all that came of it, and why it ended."""
        assert answer.response is not None
        self._view.figures(self.figures[-1])
        note = cut_off(answer.response, self.settings.max_tokens)
        if note is None:
            return
        if answer.response.generation_tokens != self.settings.max_tokens:
            note += "; /clear begins a new conversation"
        elif answer.thinking and not answer.text and not answer.calls:
            note += "; it was still thinking: /set max-tokens to more, or /set think off"
        self._view.note(note)

    def _call(self, calls: Sequence[ToolCall]) -> None:
        """Makes the calls in turn, and adds their results to the messages. Ctrl-C ends the call it meets."""
        for call in calls:
            result = "The user stopped this before it began."
            if not self.stopped:
                self._view.call(call)
                try:
                    result = run(self.functions, call.name, call.arguments)
                except KeyboardInterrupt:
                    self.stopped, result = True, "The user stopped this."
                self._view.result(result)
            self.session.messages.append({"role": "tool", "name": call.name, "content": result})


@contextmanager
def _noting_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, for the code within to look at where it can stop; a second one interrupts it anywhere."""
    asked = False

    def note(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
