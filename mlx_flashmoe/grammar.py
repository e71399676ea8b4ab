"""Answers that are valid by construction: only tokens that keep to a grammar may be picked.

The grammar engine is llguidance (the extra ``grammar``). Here stands what the grammars are, calls of the offered
tools or JSON of a schema, and how an answer keeps to one within its number of tokens:

- Thinking comes before the grammar: it is free until ``</think>``, but may not be all there is.
- A call has the checkpoint's syntax. In Qwen's it is in tags around plain text, if its values' schemas can be kept
  to in plain text, or a JSON object, which can hold every value: the model chooses. Other syntaxes have JSON only.
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
from mlx_flashmoe.tools import Tool, parameter_schemas

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
# Plain text in tags may not hold these, because the parser would take it for the value's end. JSON can hold it.
_FORBIDDEN = r"<\/parameter>[ \t\r\n]*(<parameter=|<\/function>)|\n<parameter=[^<>\n]+>\n"
_VALUE_END = "\n</parameter>\n"
_NEXT, _LAST = "<parameter=", "</function>"


class Constrainer:
    """Makes constraints for one tokenizer. The first one takes a moment, in which the vocabulary is prepared.

    Args:
        vocab_size: of the model, whose logits may have more entries than the tokenizer has tokens.

    Raises:
        RequestError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise RequestError(
                "answers kept to a grammar need the extra: pip install 'mlx-flashmoe[grammar]'"
            ) from None
        self.tokenizer = tokenizer
        tokens = tokenizer.byte_tokens()
        # The engine's own reading takes every <mark> for a special token, which no text could hold.
        source = TokenizerWrapper(_Vocabulary(tokenizer, *tokens)) if tokens else tokenizer.to_json()
        self.engine = LLTokenizer(source, n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_token_ids))

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


class _Vocabulary:
    """A byte-level vocabulary as the engine wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int]) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


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
            reason = re.sub(r"^at \d+\(\d+\): ", "", self._matcher.get_error().strip().split("\n")[0])
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
    TEXT_ENDS = (_VALUE_END + _LAST, _VALUE_END + _NEXT, '"')
    OTHER_ENDS = (
        _LAST,
        _VALUE_END + _LAST,
        _VALUE_END + _NEXT,
        "}",
        "]",
        ", ",
        "0",
        '"',
        "null",
        "true",
        "[",
        "{",
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        self._text = [encode(t) for t in self.TEXT_ENDS]
        self._other = [encode(t) for t in self.OTHER_ENDS]
        self._only_in_text = encode("~")
        self._last = encode(tokenizer.tool_syntax.json.end)

    def shortest(self, matcher: Any, most: int) -> list[int] | None:
        """Tokens that complete the answer, without its end token; None if no way of at most ``most`` is found."""
        matcher = matcher.deep_copy()
        tokens: list[int] = []
        while not matcher.is_accepting():
            step = self._end_of_calls(matcher) or matcher.compute_ff_tokens() or self._step(matcher)
            tokens += step
            if len(tokens) > most or not step or not matcher.consume_tokens(step):
                return None
        return tokens

    def _in_text(self, matcher: Any) -> bool:
        return bool(matcher.validate_tokens(self._only_in_text) == 1)

    def _end_of_calls(self, matcher: Any) -> list[int]:
        """The mark that ends all calls, if it may come now. Its first tokens may be those of another call."""
        comes = self._last and matcher.validate_tokens(self._last) == len(self._last)
        return self._last if comes and not self._in_text(matcher) else []

    def _step(self, matcher: Any) -> list[int]:
        for end in self._text if self._in_text(matcher) else self._other:
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
            json = self._tokenizer.tool_syntax.json
            several = several and self._tokenizer.tool_syntax.several
            calls = [self._call(name, parameters) for name, parameters in parameter_schemas(tools).items()]
            call = self._rule("call", " | ".join(calls))
            again = f"({self._marked(json.between)} {call})*" if several else ""
            ways.append(f"{self._marked(json.start)} {call} {again} {self._marked(json.end)}")
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

    def _marked(self, text: str) -> str:
        """Text that may have marks in it."""
        marks = self._tokenizer.tool_syntax.marks
        parts = re.split("(" + "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + ")", text)
        return " ".join(self._mark(part) if part in marks else _literal(part) for part in parts if part)

    def _call(self, name: str, schema: dict[str, Any]) -> str:
        syntax = self._tokenizer.tool_syntax
        arguments = {"type": "object", **schema}
        if syntax.json.before_name is not None:
            before, after = syntax.json.before_name + name + syntax.json.after_name, syntax.json.after_call
            return self._rule(
                "call", f"{self._marked(before)} {self._json(arguments, schema)} {self._marked(after)}"
            )
        call = {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        start, end = self._mark("<tool_call>"), self._mark("</tool_call>")
        ways = [f'"\\n" {self._json(call, schema)} "\\n"']
        parameters = self._parameters(name, schema) if syntax.tags else None
        if parameters is not None:
            ways.insert(0, f'{_literal(f"{chr(10)}<function={name}>{chr(10)}")} {parameters} "\\n"')
        return self._rule("call", f"{start} ({' | '.join(ways)}) {end}")

    def _parameters(self, name: str, schema: dict[str, Any]) -> str | None:
        """The rule for a call's parameters in tags, and for the function's end; None if the schema asks for more
        than tags can promise."""
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
        # From the last parameter to the first: what may follow each. Its end tells which of both it is.
        following: list[str] = []
        may_end = True
        for key, value in reversed(properties.items()):
            rule = self._value(value, schema, " | ".join(following), may_end)
            if rule is None:
                return None
            parameter = self._rule("parameter", f"{_literal(key + '>' + chr(10))} {rule}")
            following = [parameter] if key in required else [parameter, *following]
            may_end = may_end and key not in required
        ways = [f"{_literal(_NEXT)} ({' | '.join(following)})"] if following else []
        return f"({' | '.join([*ways, *([_literal(_LAST)] if may_end else [])])})"

    def _value(self, schema: Any, root: dict[str, Any], following: str, may_end: bool) -> str | None:
        """The rule for a value in tags, its end and what follows: text as it is, everything else as JSON.

        Args:
            following: the parameters that may follow; "" if none may.
            may_end: the function may end after the value.
        """
        for _ in range(8):  # which may name one another, and in a circle
            if isinstance(schema, dict) and schema.keys() - _REMARKS == {"$ref"}:
                schema = referred(schema, root)
        types = value_types(schema, root)
        ends = [(_NEXT, f"({following})")] if following else []
        ends += [(_LAST, "")] if may_end else []
        if types and "string" not in types:
            ways = [f"{_literal(_VALUE_END + end)} {then}" for end, then in ends]
            return f"{self._json(schema, root)} ({' | '.join(ways)})"
        if schema is True or schema == {}:
            return self._text({}, ends)
        if not isinstance(schema, dict):
            return None
        if types <= {"string"} and schema.keys() <= _PLAIN_TEXT:
            return self._text(schema, ends)
        # Text that reads as a number becomes one where numbers are allowed: well, if any number is.
        parts = [{k: v for k, v in schema.items() if k != "anyOf"}, *schema.get("anyOf", [])]
        plain = all(isinstance(part, dict) and part.keys() <= {"type"} | _REMARKS for part in parts)
        return self._text({}, ends) if plain else None

    def _text(self, schema: dict[str, Any], ends: list[tuple[str, str]]) -> str | None:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if values is not None:
            plain = all(isinstance(v, str) and not re.search(_FORBIDDEN + "|\0", v) for v in values)
            ways = [f"{_literal(v + _VALUE_END + end)} {then}" for v in values for end, then in ends]
            return f"({' | '.join(ways)})" if plain and values else None
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        ways = []
        for end, then in ends:
            close = _pattern(_VALUE_END + end)
            terminal = f"/(?s:.*){close}/ & ~/(?s:.*)({_FORBIDDEN})(?s:.*){close}/"
            if least or most != "":
                terminal += f" & /(?s:.{{{least},{most}}}){close}/"
            # Lazy: text ends at the first end. Else it would swallow it, being text as well.
            ways.append(f"{self._rule('text', self._rule('TEXT', terminal), '[lazy]')} {then}")
        return f"({' | '.join(ways)})"

    def _json(self, schema: Any, root: dict[str, Any]) -> str:
        if not isinstance(schema, dict):
            schema = {} if schema is True else {"not": {}}
        definitions = {key: root[key] for key in _DEFINITIONS if key in root}
        return f"%json {json.dumps({**definitions, **schema, 'x-guidance': _JSON_STYLE})}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    return text.replace("/", "\\/").replace("\n", "\\n")
