"""Answers that are valid by construction: only tokens that keep to a grammar may be picked.

The grammar engine is llguidance (the extra ``grammar``). Here stands what the grammars are, calls of the offered
tools or JSON of a schema, and how an answer keeps to one within its number of tokens:

- Thinking comes before the grammar: it is free until ``</think>``, but may not be all there is.
- A call has the form that the model was trained on, tags around plain text, if its values' schemas can be kept
  to in plain text; else it is a JSON object, which every schema can.
- When tokens run short, thinking is ended, and a token is only let through if the rest of the answer still fits
  after it. So an answer is complete, if its shortest form fits at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.schema import referred, value_types
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools.events import Tool, parameter_schemas

CALL_START, CALL_END = "<tool_call>", "</tool_call>"

# JSON as the chat template writes it. Free whitespace would let an unsure model write nothing else.
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}


# What may stand in a tag's name, here and in what the parser reads.
_NAME = re.compile(r"[^<>\s](?:[^<>\n]*[^<>\s])?")
# What a schema may say without making some values invalid.
_REMARKS = {"title", "description", "default", "examples", "deprecated", "$comment", "format"}
_DEFINITIONS = {"$defs", "definitions"}
_PLAIN_OBJECT = (
    {"type", "properties", "required", "additionalProperties", "$schema", "strict"} | _REMARKS | _DEFINITIONS
)
_PLAIN_TEXT = {"type", "enum", "const", "minLength", "maxLength"} | _REMARKS
# What text in tags cannot hold, because the parser would take it for the end.
_TEXT_MARKS = ("</parameter>", CALL_END)
_VALUE_END = "\n</parameter>\n"


class Constrainer:
    """Makes constraints for one tokenizer. The first one takes a moment, in which the vocabulary is prepared.

    Args:
        vocab_size: of the model, whose logits may have more entries than the tokenizer has tokens.

    Raises:
        RequestError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise RequestError(
                "answers kept to a grammar need the extra: pip install 'mlx-flashmoe[grammar]'"
            ) from None
        self.tokenizer = tokenizer
        self.engine = LLTokenizer(
            tokenizer.to_json(), n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_token_ids)
        )

    def constraint(
        self,
        max_tokens: int,
        *,
        tools: Sequence[Tool] = (),
        several: bool = True,
        schema: Any = None,
        thinking: bool = False,
    ) -> Constraint:
        """A logits processor for one answer.

        Args:
            max_tokens: of the answer, its thinking included; -1 for no limit.
            tools: the answer is a call of one of them; or calls, if ``several``.
            schema: the answer is JSON of this schema. With tools too, either.
            thinking: the prompt has opened a thinking part.

        Raises:
            RequestError: a schema has what cannot be kept to, or max_tokens cannot hold the shortest answer.
        """
        rules = _Rules(self.tokenizer)
        start = rules.start(tools, several, schema)
        return Constraint(
            self, rules.grammar(('"\\n\\n" ' if thinking else "") + start), max_tokens, thinking
        )


class Constraint:
    """Lets only the tokens of a grammar through. Use it for one answer, as a logits processor."""

    # How many of the likeliest tokens are looked at when tokens run short.
    CANDIDATES = 4

    def __init__(self, constrainer: Constrainer, grammar: str, max_tokens: int, thinking: bool) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(constrainer.engine, LLMatcher.grammar_from_lark(grammar), log_level=0)
        self._allowed(constrainer.engine.vocab_size)
        self._tokenizer = constrainer.tokenizer
        self._max_tokens = max_tokens
        self._thinking = thinking
        self._seen: int | None = None  # tokens of the prompt and the answer that the matcher knows of
        self._prompt = 0
        self._last = -1
        # When tokens run short: how the answer can end after each of the tokens that were let through.
        self._rests: dict[int, list[int]] = {}
        self._ends = _Ends(self._tokenizer)
        shortest = self._ends.shortest(self._matcher, 1024)
        least = 0 if shortest is None else len(shortest) + 1 + thinking  # with </think> and the end token
        if 0 <= max_tokens < least:
            raise RequestError(
                f"max_tokens is {max_tokens}, but the shortest answer asked for has {least} tokens"
            )
        # From so many tokens on, what is left is counted.
        self._short = least + 64

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self._follow(tokens)
        left = self._max_tokens - (tokens.size - self._prompt) if self._max_tokens >= 0 else None
        short = left is not None and left <= self._short
        if self._thinking:
            if short:
                return _only([self._tokenizer.think_end_id], logits)
            ends = mx.array(sorted(self._tokenizer.eos_token_ids))[None]
            return mx.put_along_axis(logits, ends, mx.array(-mx.inf, logits.dtype), axis=-1)
        if self._matcher.is_stopped():
            return _only(self._tokenizer.eos_token_ids, logits)
        allowed = self._allowed(logits.shape[-1])
        if short:
            assert left is not None
            fitting = self._fitting(allowed, np.array(logits[0]), left)
            if fitting:
                return _only(fitting, logits)
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def _follow(self, tokens: mx.array) -> None:
        """Tells the matcher the tokens that came since the last call."""
        if self._seen is None:
            self._prompt = self._seen = tokens.size
        for token in np.array(tokens[self._seen :]).tolist():
            if self._thinking:
                self._thinking = token != self._tokenizer.think_end_id
            elif token not in self._tokenizer.eos_token_ids:
                self._matcher.consume_token(token)
            self._last = token
        self._seen = tokens.size
        self._check()

    def _allowed(self, vocabulary: int) -> np.ndarray:
        """bool [vocabulary]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=vocabulary, bitorder="little").astype(bool)
        if not allowed.any():
            raise RequestError("the answer cannot be kept to the schema: nothing satisfies it")
        return allowed

    def _fitting(self, allowed: np.ndarray, logits: np.ndarray, left: int) -> list[int]:
        """The likeliest allowed tokens after which the answer can still be completed, of ``left`` in all."""
        rest = self._rests.get(self._last)
        if rest is None:
            rest = self._ends.shortest(self._matcher, left - 1)  # one for the end token
        self._rests = {}
        if rest is not None:
            self._rests = (
                {rest[0]: rest[1:]} if rest else {token: [] for token in self._tokenizer.eos_token_ids}
            )
        candidates = np.flatnonzero(allowed)
        for token in candidates[np.argsort(-logits[candidates])[: self.CANDIDATES]].tolist():
            if token in self._tokenizer.eos_token_ids:
                self._rests[token] = []
            elif token not in self._rests:
                after = self._matcher.deep_copy()
                after.consume_token(token)
                rest = self._ends.shortest(after, left - 2)
                if rest is not None:
                    self._rests[token] = rest
        return list(self._rests)

    def _check(self) -> None:
        if self._matcher.is_error():
            # The first line says it; what follows is the grammar.
            reason = self._matcher.get_error().strip().split("\n")[0]
            raise RequestError(f"the answer cannot be kept to the schema: {reason}")


def _only(tokens: Any, logits: mx.array) -> mx.array:
    """Logits [1, V], -inf but for some tokens."""
    some = mx.array(sorted(tokens))[None]
    return mx.put_along_axis(
        mx.full(logits.shape, -mx.inf, logits.dtype), some, mx.take_along_axis(logits, some, axis=-1), axis=-1
    )


class _Ends:
    """Finds a short way to the end of an answer: by what usually ends a thing, not by a search."""

    # What ends things, first what ends most. Within a string, where all of them are text, only its own end does.
    TEXT_ENDS = (_VALUE_END, '"')
    OTHER_ENDS = (_VALUE_END, "}", "]", ", ", "0", '"', "null", "true", "[", "{")

    def __init__(self, tokenizer: Tokenizer) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        self._text = [encode(t) for t in self.TEXT_ENDS]
        self._other = [encode(t) for t in self.OTHER_ENDS]
        self._only_in_text = encode("~")

    def shortest(self, matcher: Any, most: int) -> list[int] | None:
        """Tokens that complete the answer, without its end token; None if no way of at most ``most`` is found."""
        matcher = matcher.deep_copy()
        tokens: list[int] = []
        while not matcher.is_accepting():
            step = matcher.compute_ff_tokens() or self._step(matcher)
            tokens += step
            if len(tokens) > most or not step or not matcher.consume_tokens(step):
                return None
        return tokens

    def _step(self, matcher: Any) -> list[int]:
        in_text = matcher.validate_tokens(self._only_in_text) == 1
        for end in self._text if in_text else self._other:
            if matcher.validate_tokens(end) == len(end):
                return end
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        return [int(np.argmax(bits))] if bits.any() else []


# Grammars, in llguidance's dialect of Lark


class _Rules:
    """Collects the rules of one grammar."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lines: list[str] = []

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._lines])

    def start(self, tools: Sequence[Tool], several: bool, schema: Any) -> str:
        ways = []
        if tools:
            calls = [self._call(name, parameters) for name, parameters in parameter_schemas(tools).items()]
            call = self._rule("call", " | ".join(calls))
            ways.append(f'{call} ("\\n" {call})*' if several else call)
        if schema is not None:
            ways.append(self._json(schema, {}))
        return self._rule("answer", " | ".join(ways))

    def _rule(self, name: str, body: str, option: str = "") -> str:
        name = f"{name}_{len(self._lines)}"
        self._lines.append(f"{name}{option}: {body}")
        return name

    def _mark(self, text: str) -> str:
        """A mark that most vocabularies have as one token."""
        token = self._tokenizer.token_id(text)
        return _literal(text) if token is None else f"<[{token}]>"

    def _call(self, name: str, schema: dict[str, Any]) -> str:
        parameters = self._parameters(name, schema)
        if parameters is None:
            call = {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"type": "object", **schema}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            body = f'"\\n" {self._json(call, schema)} "\\n"'
        else:
            head = _literal(f"\n<function={name}>\n")
            body = f'{head} {parameters} "</function>\\n"'
        return self._rule("call", f"{self._mark(CALL_START)} {body} {self._mark(CALL_END)}")

    def _parameters(self, name: str, schema: dict[str, Any]) -> str | None:
        """The rule for a call's parameters in tags; None if the schema asks for more than tags can promise."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not (
            schema.keys() <= _PLAIN_OBJECT
            and schema.get("type", "object") == "object"
            and isinstance(properties, dict)
            and isinstance(required, list)
            and all(r in properties for r in required)
            and all(_NAME.fullmatch(n) for n in [name, *properties])
        ):
            return None
        parts = []
        for key, value in properties.items():
            rule = self._value(value, schema)
            if rule is None:
                return None
            head = _literal(f"<parameter={key}>\n")
            parameter = self._rule("parameter", f"{head} {rule}")
            parts.append(parameter if key in required else f"{parameter}?")
        return " ".join(parts)

    def _value(self, schema: Any, root: dict[str, Any]) -> str | None:
        """The rule for a value in tags and the tag that ends it: text as it is, everything else as JSON."""
        for _ in range(8):  # which may name one another, and in a circle
            if isinstance(schema, dict) and schema.keys() - _REMARKS == {"$ref"}:
                schema = referred(schema, root)
        types = value_types(schema, root)
        if types and "string" not in types:
            return f"{self._json(schema, root)} {_literal(_VALUE_END)}"
        if schema is True or schema == {}:
            return self._text({})
        if not isinstance(schema, dict):
            return None
        if types <= {"string"} and schema.keys() <= _PLAIN_TEXT:
            return self._text(schema)
        # Text that reads as a number becomes one where numbers are allowed: well, if any number is.
        ways = [{k: v for k, v in schema.items() if k != "anyOf"}, *schema.get("anyOf", [])]
        plain = all(isinstance(way, dict) and way.keys() <= {"type"} | _REMARKS for way in ways)
        return self._text({}) if plain else None

    def _text(self, schema: dict[str, Any]) -> str | None:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if values is not None:
            plain = all(isinstance(v, str) and not any(m in v for m in (*_TEXT_MARKS, "\0")) for v in values)
            return f"({' | '.join(_literal(v + _VALUE_END) for v in values)})" if plain and values else None
        marks, end = ("|".join(map(_pattern, _TEXT_MARKS)), _pattern(_VALUE_END))
        terminal = f"/(?s:.*){end}/ & ~/(?s:.*)({marks})(?s:.*){end}/"
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        if least or most != "":
            terminal += f" & /(?s:.{{{least},{most}}}){end}/"
        # Lazy: text ends at the first end tag. Else it would swallow the tag, being text as well.
        return self._rule("text", self._rule("TEXT", terminal), "[lazy]")

    def _json(self, schema: Any, root: dict[str, Any]) -> str:
        if not isinstance(schema, dict):
            schema = {} if schema is True else {"not": {}}
        definitions = {key: root[key] for key in _DEFINITIONS if key in root}
        return f"%json {json.dumps({**definitions, **schema, 'x-guidance': _JSON_STYLE})}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    return text.replace("/", "\\/").replace("\n", "\\n")
