"""What requests look like: JSON schemas that they are checked against and that /openapi.json publishes.

Fields that are not named are ignored, as both APIs grow; fields that would change the answer, and are not
supported, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": 2**31}


def maybe(schema: Schema) -> Schema:
    """The schema, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object. Optional fields may be null."""
    properties = {**required, **{key: maybe(schema) for key, schema in (optional or {}).items()}}
    return {"type": "object", "properties": properties, "required": list(required)}


def kind(
    name: str, required: dict[str, Schema] | None = None, optional: dict[str, Schema] | None = None
) -> Schema:
    """One of several objects, told apart by "type"."""
    return record({"type": {"const": name}, **(required or {})}, optional)


def items(schema: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": schema, **limits}


# What both APIs have, and what is added to them under the names that other servers use.
SAMPLING: dict[str, Schema] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": -1, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 2**31},
}
PENALTY: Schema = {"type": "number", "minimum": -2, "maximum": 2}
REPETITION: Schema = {"type": "number", "minimum": 0, "maximum": 100}
WINDOW: Schema = {"type": "integer", "minimum": -1, "maximum": 2**31}
OPENAI_SAMPLING: dict[str, Schema] = {
    **SAMPLING,
    "min_p": {"type": "number", "minimum": -1, "maximum": 1},
    "repetition_penalty": REPETITION,
    "repeat_penalty": REPETITION,
    "repetition_context_size": WINDOW,
    "repeat_last_n": WINDOW,
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "logit_bias": {"type": "object"},
    "seed": {"type": "integer"},
    "n": {"type": "integer", "minimum": 1},
    "max_tokens": {"type": "integer"},
    "max_completion_tokens": {"type": "integer"},
}
STREAM: dict[str, Schema] = {
    "stream": {"type": "boolean"},
    "stream_options": record({}, {"include_usage": {"type": "boolean"}}),
}
STOP: Schema = {"anyOf": [TEXT, items(TEXT, maxItems=16)]}

# OpenAI

# Parts and calls in messages, and tools, are read as far as they are known (content.py, offered.py): clients send
# more kinds than any list has, and what stands in a conversation's history must not make all of it fail.
CONTENT: Schema = maybe({"anyOf": [TEXT, {"type": "object"}, items({"anyOf": [{"type": "object"}, TEXT]})]})
OPENAI_MESSAGE = record(
    {"role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]}}, {"content": CONTENT}
)
TOOLS = items({"type": "object"})
OPENAI_CHOICE: Schema = {"anyOf": [{"enum": ["none", "auto", "required", "any"]}, {"type": "object"}]}
RESPONSE_FORMAT: Schema = {
    "description": "text, json_object (with or without a schema) or json_schema, as the object's type"
}
CHAT_COMPLETION = record(
    {"messages": items(OPENAI_MESSAGE, minItems=1)},
    {
        "model": TEXT,
        **OPENAI_SAMPLING,
        **STREAM,
        "stop": STOP,
        "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "tools": TOOLS,
        "tool_choice": OPENAI_CHOICE,
        "parallel_tool_calls": {"type": "boolean"},
        "response_format": RESPONSE_FORMAT,
        "reasoning_effort": TEXT,
        "enable_thinking": {"type": "boolean"},
        "chat_template_kwargs": {"type": "object"},
    },
)
TOKENS = items({"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, minItems=1)
# By the first item, so that what is wrong with a later one can be named.
PROMPT: Schema = {
    "if": {"type": "array"},
    "then": {
        "if": {"prefixItems": [TEXT]},
        "then": items(TEXT, minItems=1),
        "else": {"if": {"prefixItems": [{"type": "array"}]}, "then": items(TOKENS), "else": TOKENS},
    },
    "else": TEXT,
}
COMPLETION = record(
    {"prompt": PROMPT},
    {
        "model": TEXT,
        **OPENAI_SAMPLING,
        **STREAM,
        "stop": STOP,
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "response_format": RESPONSE_FORMAT,
        "echo": {"type": "boolean"},
        "suffix": TEXT,
        "best_of": {"type": "integer"},
    },
)

TOKENIZE = record({"prompt": TEXT}, {"model": TEXT, "add_special_tokens": {"type": "boolean"}})
DETOKENIZE = record({"tokens": {**TOKENS, "minItems": 0}}, {"model": TEXT})

# Anthropic

ANTHROPIC_MESSAGE = record({"role": {"enum": ["user", "assistant", "system"]}}, {"content": CONTENT})
PARALLEL = {"disable_parallel_tool_use": {"type": "boolean"}}
ANTHROPIC_CHOICE: Schema = {
    "anyOf": [
        kind("auto", None, PARALLEL),
        kind("any", None, PARALLEL),
        kind("tool", {"name": TEXT}, PARALLEL),
        kind("none"),
    ]
}
CONVERSATION = {
    "model": TEXT,
    "system": CONTENT,
    "tools": TOOLS,
    "tool_choice": ANTHROPIC_CHOICE,
    "thinking": {"anyOf": [{"type": "object"}, {"type": "boolean"}, TEXT]},
    "output_config": {"type": "object"},
}
MESSAGE = record(
    {"messages": items(ANTHROPIC_MESSAGE, minItems=1), "max_tokens": COUNT},
    {
        **CONVERSATION,
        **SAMPLING,
        "stream": {"type": "boolean"},
        "stop_sequences": items(TEXT, maxItems=16),
    },
)
COUNT_TOKENS = record({"messages": items(ANTHROPIC_MESSAGE, minItems=1)}, CONVERSATION)


# Checking
#
# jsonschema's own keywords look at every item however many are wrong, and put all that is wrong into the message:
# a large body of the wrong kind took half a minute. These say the same of small values, and little of large ones.


def _shown(value: Any) -> str:
    if isinstance(value, dict | list) and value:
        return f"an object of {len(value)} fields" if isinstance(value, dict) else f"an array of {len(value)}"
    return repr(value if not isinstance(value, str) or len(value) <= 300 else value[:300] + " …")


def _type(validator: Any, types: str, value: Any, schema: Schema) -> Iterator[ValidationError]:
    if not validator.is_type(value, types):
        yield ValidationError(f"{_shown(value)} is not of type {types!r}")


def _enum(validator: Any, known: list[Any], value: Any, schema: Schema) -> Iterator[ValidationError]:
    if not isinstance(value, str) or value not in known:
        yield ValidationError(f"{_shown(value)} is not one of {known!r}")


def _any_of(validator: Any, options: list[Schema], value: Any, schema: Schema) -> Iterator[ValidationError]:
    context: list[ValidationError] = []
    for i, option in enumerate(options):
        errors = list(validator.descend(value, option, schema_path=i))
        if not errors:
            return
        context += errors
    yield ValidationError(f"{_shown(value)} is not valid under any of the given schemas", context=context)


def _max_items(validator: Any, most: int, value: Any, schema: Schema) -> Iterator[ValidationError]:
    if isinstance(value, list) and len(value) > most:
        yield ValidationError(f"{_shown(value)} is too long: it may have {most} items")


def _max_properties(validator: Any, most: int, value: Any, schema: Schema) -> Iterator[ValidationError]:
    if isinstance(value, dict) and len(value) > most:
        yield ValidationError(f"{_shown(value)} has too many fields: it may have {most}")


def _items(validator: Any, item: Schema, value: Any, schema: Schema) -> Iterator[ValidationError]:
    """What is wrong with the first item that is wrong; of an array that is too long, only that it is."""
    if not isinstance(value, list) or len(value) > schema.get("maxItems", len(value)):
        return
    plain = _plain(item)
    for i, part in enumerate(value):
        if plain is not None and plain(part):
            continue
        errors = list(validator.descend(part, item, path=i))
        if errors:
            yield from errors
            return


def _plain(schema: Schema) -> Callable[[Any], bool] | None:
    """A quick test that all texts, or all integers of a range, pass; None for another schema."""
    if schema == TEXT:
        return lambda value: type(value) is str
    if schema.keys() == {"type", "minimum", "maximum"} and schema["type"] == "integer":
        least, most = schema["minimum"], schema["maximum"]
        return lambda value: (
            (type(value) is int or (type(value) is float and value.is_integer())) and least <= value <= most
        )
    return None


_Validator = extend(
    Draft202012Validator,
    {
        "type": _type,
        "enum": _enum,
        "anyOf": _any_of,
        "maxItems": _max_items,
        "maxProperties": _max_properties,
        "items": _items,
    },
)


def validator(schema: Schema) -> Draft202012Validator:
    """The validators of request bodies."""
    return _Validator(schema)


VALIDATORS = {
    schema_name: validator(schema)
    for schema_name, schema in (
        ("chat_completion", CHAT_COMPLETION),
        ("completion", COMPLETION),
        ("tokenize", TOKENIZE),
        ("detokenize", DETOKENIZE),
        ("message", MESSAGE),
        ("count_tokens", COUNT_TOKENS),
    )
}


OPENAI_ERROR = record({"error": record({"message": TEXT, "type": TEXT})})


class Operation(NamedTuple):
    """A method of a path, for the description of the server.

    Attributes:
        request: the body; None for a method without one.
        error: the answer where it fails.
        name: of the path's one parameter, if it has one.
        missing: status 404 says that there is no such thing.
        stream: the media type of a streamed answer; None if it never is one.
    """

    summary: str
    answer: Schema
    request: Schema | None = None
    error: Schema = OPENAI_ERROR
    name: str | None = None
    missing: bool = False
    stream: str | None = "text/event-stream"


def openapi(
    title: str, version: str, keyed: bool, more: Mapping[str, Mapping[str, Operation]]
) -> dict[str, Any]:
    """The OpenAPI description of the server.

    Args:
        keyed: it asks for a key.
        more: operations by path and method, of APIs that describe themselves.
    """
    anthropic_error = record({"type": {"const": "error"}, "error": record({"message": TEXT, "type": TEXT})})

    def operation(
        summary: str,
        answer: Schema,
        request: Schema | None = None,
        error: Schema = OPENAI_ERROR,
        name: str | None = None,
        missing: bool = False,
        stream: str | None = "text/event-stream",
    ) -> Schema:
        media = "text/plain" if answer == TEXT else "application/json"
        content: dict[str, Any] = {media: {"schema": answer}}
        refused = {"content": {"application/json": {"schema": error}}}
        out: dict[str, Any] = {
            "summary": summary,
            "responses": {"200": {"description": "The answer", "content": content}},
        }
        codes = {"401": "The key is missing or wrong"} if keyed else {}
        if request is not None:
            if stream is not None:
                sent = record({"data": TEXT}, {"event": TEXT}) if stream == "text/event-stream" else answer
                content[stream] = {"schema": sent}
            out["requestBody"] = {"required": True, "content": {"application/json": {"schema": request}}}
            codes |= {
                "400": "The request cannot be served as it is",
                "413": "The request is too large",
                "429": "The queue is full; Retry-After says when to try again",
            }
        if missing:
            codes["404"] = "There is no such thing"
        if name is not None:
            schema = {**TEXT, "minLength": 1}
            out["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema}]
        out["responses"] |= {code: {"description": text, **refused} for code, text in codes.items()}
        return out

    listed = record(
        {"id": TEXT, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": TEXT}
    )
    completion = record({"id": TEXT, "choices": items({"type": "object"}), "usage": {"type": "object"}})
    message = record({"id": TEXT, "type": {"const": "message"}, "content": items({"type": "object"})})
    paths = {
        "/health": {"get": operation("Whether the model can answer", record({"status": TEXT}))},
        "/metrics": {"get": operation("Counts, for Prometheus", TEXT)},
        "/v1/models": {"get": operation("The model that is served", record({"data": items(listed)}))},
        "/v1/models/{model}": {"get": operation("The model", listed, name="model", missing=True)},
        "/v1/chat/completions": {
            "post": operation("An answer in a conversation", completion, CHAT_COMPLETION)
        },
        "/v1/completions": {"post": operation("The continuation of a text", completion, COMPLETION)},
        "/tokenizer_info": {
            "get": operation("Special tokens and chat template", record({}, {"eos_token": TEXT}))
        },
        "/tokenize": {
            "post": operation(
                "The tokens of a text", record({"tokens": {**TOKENS, "minItems": 0}}), TOKENIZE
            ),
        },
        "/detokenize": {
            "post": operation("The text of tokens", record({"prompt": TEXT}), DETOKENIZE),
        },
        "/v1/messages": {
            "post": operation("An answer in a conversation", message, MESSAGE, anthropic_error),
        },
        "/v1/messages/count_tokens": {
            "post": operation(
                "The number of tokens of a conversation",
                record({"input_tokens": {"type": "integer"}}),
                COUNT_TOKENS,
                anthropic_error,
            ),
        },
    }
    for path, methods in more.items():
        paths[path] = {method: operation(*described) for method, described in methods.items()}
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
    }
    if keyed:
        description["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        description["security"] = [{"key": []}]
    return description
