"""How good a converted model is: perplexity, agreement with another, answers and tool calls on a held-out set.

Perplexity is over every token of a text but the first, each predicted from what precedes it in its chunk of
``CONTEXT`` tokens. Held-out questions are answered greedily through the chat template; only what is said counts, not
the thinking before it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_flashmoe.console import print_note
from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.generate import stream_generate
from mlx_flashmoe.loader import StreamingModel, load
from mlx_flashmoe.progress import Steps
from mlx_flashmoe.reports import check_report, write_report
from mlx_flashmoe.scoring import row_logprobs
from mlx_flashmoe.terminal.bars import loading_bar
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools import QWEN, Syntax, Text, Tool, ToolCall, parameter_schemas, parse_answer
from mlx_flashmoe.watch import MemoryWatch

CONTEXT = 512  # tokens of a chunk of text
LONGEST_ANSWER = 1024  # tokens; one that is longer is cut off there


@dataclass(frozen=True)
class TextFigures:
    """A text under a model.

    Attributes:
        tokens, bytes: that were predicted.
        nats: the negative log-likelihood of them all.
        kl: mean over tokens of KL(other || model), in nats; None without another model.
        top1: share of tokens where both find the same token most likely.
    """

    tokens: int
    bytes: int
    nats: float
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)


@dataclass(frozen=True)
class Question:
    """A line of a held-out set.

    Attributes:
        messages: up to the last word of the user or of a tool.
        expected: the message to come; its content or its tool calls count.
    """

    task: str
    thinking: bool
    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    expected: dict[str, Any]

    @property
    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        functions = [call["function"] for call in self.expected.get("tool_calls") or ()]
        return [(f["name"], f["arguments"]) for f in functions]


@dataclass(frozen=True)
class Verdict:
    """One answer. ``right``: the expected text where no call was expected, else the expected calls."""

    task: str
    called: bool
    right: bool
    valid: bool


@dataclass
class AnswerFigures:
    """Answers to a held-out set; rates are None where nothing of the kind was asked for."""

    verdicts: list[Verdict] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def exact(self) -> float | None:
        """Share of exactly right answers among questions that want no call."""
        return _share([v.right for v in self.verdicts if not v.called])

    @property
    def correct_calls(self) -> float | None:
        """Share of answers with exactly the expected calls, among questions that want some."""
        return _share([v.right for v in self.verdicts if v.called])

    @property
    def valid_calls(self) -> float | None:
        """Share of answers with calls that all fit their tools' schemas, among questions that want some."""
        return _share([v.valid for v in self.verdicts if v.called])

    def by_task(self) -> dict[str, tuple[int, int]]:
        """Right answers, and questions, of every task."""
        tasks: dict[str, list[bool]] = defaultdict(list)
        for verdict in self.verdicts:
            tasks[verdict.task].append(verdict.right)
        return {task: (sum(right), len(right)) for task, right in sorted(tasks.items())}


def record_routing(model: StreamingModel) -> list[list[mx.array]]:
    """For each layer with experts, a list that from now on gets the ids [tokens, active] of every call of them."""
    picked: dict[int, list[mx.array]] = {layer: [] for layer in model.arena.store.layers}
    model.on_routing(lambda layer, ids: picked[layer].append(ids))
    return list(picked.values())


class ExpertUse:
    """Counts how often each expert is picked, from the moment it is made; for a model loaded without read-ahead.

    Attributes:
        counts: [layers, experts]; complete after ``collect``.
        tokens: that went through a layer.
    """

    def __init__(self, model: StreamingModel) -> None:
        self._picked = record_routing(model)
        self.counts = np.zeros((len(self._picked), model.model.config.num_experts), np.int64)
        self.tokens = 0

    def collect(self) -> None:
        for layer, picked in enumerate(self._picked):
            ids = [np.array(p).reshape(-1, p.shape[-1]) for p in picked]
            picked.clear()
            if not ids:
                continue
            every = np.concatenate(ids)
            self.counts[layer] += np.bincount(every.reshape(-1), minlength=self.counts.shape[1])
            if layer == 0:
                self.tokens += len(every)

    @property
    def most_used(self) -> list[float]:
        """By layer, the share of tokens that use its most used expert."""
        return [float(share) for share in self.counts.max(1) / max(1, self.tokens)]

    @property
    def unused(self) -> float:
        """Share of experts that no token used."""
        return float((self.counts == 0).mean())


def run(
    folder: str,
    *,
    text: str | None = None,
    against: str | None = None,
    heldout: str | None = None,
    limit: int | None = None,
    json_file: str | None = None,
    **options: Any,
) -> None:
    """Evaluates, prints tables, and writes the figures to ``json_file`` if given.

    Args:
        text, heldout: files.
        against: another converted folder.
        options: of ``load``.

    Raises:
        FlashMoEError: nothing to evaluate on, a file that cannot be read or written, or a folder that cannot be used.
    """
    if text is None and heldout is None:
        raise RequestError("nothing to evaluate on: give a text (--text) or a held-out set (--heldout)")
    if against is not None and text is None:
        raise RequestError("--against compares on a text: give one (--text)")
    if limit is not None and limit < 1:
        raise RequestError(f"--limit should be at least 1, but is {limit}")
    check_report(json_file)
    passage = None if text is None else _read(text)
    questions = None if heldout is None else read_questions(heldout)[:limit]

    console = Console(highlight=False)
    with closing(loading_bar()) as bar:
        model, tokenizer = load(folder, **options, read_ahead=False, announce=print_note, progress=bar)
    use, watch = ExpertUse(model), MemoryWatch(print_note)
    report: dict[str, Any] = {
        "model": Path(folder).resolve().name,
        "active_experts": options.get("active_experts"),
    }
    if passage is not None:
        # The other model's output does not depend on its memory: it takes as little as it can.
        other = None if against is None else load(against, "os", read_ahead=False)
        length = len(tokenizer.encode(passage, add_special_tokens=False))
        with watch, Steps("perplexity", length, "tokens") as steps:
            figures = evaluate_text(model, tokenizer, passage, other, steps.advance)
        use.collect()
        report["text"] = {
            **asdict(figures),
            "perplexity": figures.perplexity,
            "bits_per_byte": figures.bits_per_byte,
        }
        console.print(_text_table(figures))
    if questions is not None:
        answers = AnswerFigures()
        with watch, Steps("answers", len(questions), "questions") as steps:
            for question in questions:
                answer_question(model, tokenizer, question, answers)
                use.collect()
                steps.advance()
        report["heldout"] = {
            "questions": len(answers.verdicts),
            "exact": answers.exact,
            "correct_calls": answers.correct_calls,
            "valid_calls": answers.valid_calls,
            "tokens": answers.tokens,
            "seconds": answers.seconds,
            "tasks": answers.by_task(),
        }
        console.print(_task_table(answers))
        console.print(_answer_table(answers))
    report["experts"] = {"tokens": use.tokens, "most_used": use.most_used, "unused": use.unused}
    console.print(_use_table(use))
    if json_file is not None:
        write_report(json_file, report)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise RequestError(f"{file}: cannot be read: {e}") from None


def read_questions(file: str) -> list[Question]:
    """The questions of a JSON-lines file.

    Raises:
        RequestError: it cannot be read, holds none, or a line is not a question.
    """
    questions = []
    for number, line in enumerate(_read(file).splitlines(), 1):
        try:
            question = Question(**json.loads(line))
            question.calls  # noqa: B018 - a malformed call should be found here, not after a minute
            question.expected["content"]
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise RequestError(
                f"{file}, line {number}: task, thinking, tools, messages and expected are needed: {e!r}"
            ) from None
        questions.append(question)
    if not questions:
        raise RequestError(f"{file}: holds no questions")
    return questions


# Text


def evaluate_text(
    model: StreamingModel,
    tokenizer: Tokenizer,
    text: str,
    other: tuple[StreamingModel, Tokenizer] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> TextFigures:
    """How well ``model`` predicts ``text``, and how far it is from ``other``, a model of the same vocabulary.

    Args:
        progress: called with the number of tokens of each chunk that is done.

    Raises:
        RequestError: fewer than two tokens, or ``other`` splits the text into other tokens.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < 2:
        raise RequestError("the text is too short: it should have at least two tokens")
    if other is not None and other[1].encode(text, add_special_tokens=False) != ids:
        raise RequestError("the two models split the text into different tokens: they cannot be compared")
    tokens = mx.array(ids)
    nats = kl = same = 0.0
    for begin in range(0, len(ids) - 1, CONTEXT):
        end = min(begin + CONTEXT, len(ids) - 1)
        chunk, targets = tokens[begin:end], tokens[begin + 1 : end + 1]
        others = row_logprobs(other[0], chunk, other[0].make_cache()) if other is not None else repeat(None)
        for logprobs, reference in zip(row_logprobs(model, chunk, model.make_cache()), others):
            rows, targets = targets[: len(logprobs)], targets[len(logprobs) :]
            nats -= _number(mx.take_along_axis(logprobs, rows[:, None], axis=-1).sum())
            if reference is not None:
                kl += _number((mx.exp(reference) * (reference - logprobs)).sum())
                same += _number((reference.argmax(-1) == logprobs.argmax(-1)).sum())
        progress(end - begin)
    count = len(ids) - 1
    size = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    if other is None:
        return TextFigures(count, size, nats)
    return TextFigures(count, size, nats, kl / count, same / count)


def _number(scalar: mx.array) -> float:
    return float(np.asarray(scalar))


# Answers


def answer_questions(
    model: StreamingModel, tokenizer: Tokenizer, questions: Iterable[Question]
) -> AnswerFigures:
    figures = AnswerFigures()
    for question in questions:
        answer_question(model, tokenizer, question, figures)
    return figures


def answer_question(
    model: StreamingModel, tokenizer: Tokenizer, question: Question, figures: AnswerFigures
) -> str:
    """The model's answer as it writes it; what it is worth is added to ``figures``."""
    prompt = tokenizer.apply_chat_template(
        question.messages, tools=question.tools, enable_thinking=question.thinking
    )
    started = perf_counter()
    pieces = []
    for response in stream_generate(model, tokenizer, prompt, max_tokens=LONGEST_ANSWER):
        pieces.append(response.text)
        figures.tokens += 1
    figures.seconds += perf_counter() - started
    figures.prompt_tokens += len(prompt)
    answer = "".join(pieces)
    figures.verdicts.append(judge(question, answer, tokenizer.opens_thinking(prompt), tokenizer.tool_syntax))
    return answer


def judge(question: Question, answer: str, thinking: bool, syntax: Syntax = QWEN) -> Verdict:
    """Compares an answer, the generated text, with the expected one.

    Args:
        thinking: it begins inside a thinking part.
        syntax: of the model's calls.
    """
    events = parse_answer(answer, question.tools, thinking, syntax)
    text = "".join(event.text for event in events if isinstance(event, Text)).strip()
    calls = [event for event in events if isinstance(event, ToolCall)]
    made = [(call.name, call.arguments) for call in calls]
    if question.calls:
        right = _as_json(made) == _as_json(question.calls)
    else:
        right = not calls and text == question.expected["content"].strip()
    valid = (
        bool(calls)
        and not any(mark in text for mark in syntax.marks)
        and all(fits(call, question.tools) for call in calls)
    )
    return Verdict(question.task, bool(question.calls), right, valid)


def _as_json(value: Any) -> str:
    """For comparing: 1, 1.0 and true are equal to Python, and different values here."""
    return json.dumps(value, sort_keys=True)


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def fits(call: ToolCall, tools: Iterable[Tool]) -> bool:
    """Whether a call names one of the tools and known parameters, has the required ones, and JSON types are right."""
    schemas = parameter_schemas(tools)
    return call.name in schemas and _fits(call.arguments, {"type": "object", **schemas[call.name]})


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    named = schema.get("type")
    types = [named] if isinstance(named, str) else named or []
    if types and not any(_is(value, t) for t in types):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, dict) and "properties" in schema:
        properties = schema["properties"]
        return set(schema.get("required", ())) <= value.keys() and all(
            key in properties and _fits(inner, properties[key]) for key, inner in value.items()
        )
    return not isinstance(value, list) or all(_fits(inner, schema.get("items") or {}) for inner in value)


def _is(value: Any, json_type: str) -> bool:
    if isinstance(value, bool):
        return json_type == "boolean"
    return isinstance(value, _TYPES.get(json_type, (object,)))


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None


# Tables


def _table(title: str) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _text_table(figures: TextFigures) -> Table:
    table = _table(f"Text, {figures.tokens:,} tokens")
    table.add_row("perplexity", f"{figures.perplexity:.4g}")
    table.add_row("bits a byte", f"{figures.bits_per_byte:.4f}")
    if figures.kl is not None:
        table.add_row("KL from the other model, nats a token", f"{figures.kl:.3g}")
        table.add_row("same most likely token", _percent(figures.top1))
    return table


def _task_table(answers: AnswerFigures) -> Table:
    table = _table("Right answers by task")
    for task, (right, asked) in answers.by_task().items():
        table.add_row(task, f"{right} of {asked}")
    return table


def _answer_table(answers: AnswerFigures) -> Table:
    table = _table(f"Answers, {len(answers.verdicts)} questions")
    table.add_row("exact, where no call is expected", _percent(answers.exact))
    table.add_row("correct calls, where some are", _percent(answers.correct_calls))
    table.add_row("calls that fit their tools' schemas", _percent(answers.valid_calls))
    table.add_row("generated tok/s, prompts included", f"{answers.tokens / answers.seconds:.1f}")
    return table


def _use_table(use: ExpertUse) -> Table:
    table = _table(f"Experts, {use.tokens:,} tokens")
    table.add_row("largest share of a layer's tokens with one", _percent(max(use.most_used)))
    table.add_row("never used", _percent(use.unused))
    return table
