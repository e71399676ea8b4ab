"""The settings of a request, by every name that clients use for them: sampling, length, thinking, form, stops.

Pure functions over a request's body, or over Ollama's ``options``, for all APIs. A field that is null counts as
absent. Each function raises ApiError, status 400, that names the field, its value and the values that are right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_flashmoe.server.errors import ApiError

Body = Mapping[str, Any]

MOST_CHOICES = 128  # answers of one request
MOST_BIASES = 4096  # tokens that one request may favour or ban

# Numbers of sampling: the client's name, the sampler's argument, the range.
_NUMBERS = (
    ("temperature", "temp", 0, 2),
    ("top_p", "top_p", -1, 1),
    ("min_p", "min_p", -1, 1),
    ("presence_penalty", "presence_penalty", -2, 2),
    ("frequency_penalty", "frequency_penalty", -2, 2),
    ("repeat_penalty", "repetition_penalty", 0, 100),
    ("repetition_penalty", "repetition_penalty", 0, 100),
)
_WINDOWS = ("repeat_last_n", "repetition_context_size")
LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n_predict", "num_predict")


def sampling(body: Body) -> dict[str, Any]:
    """The sampling that a request asks for, as arguments of ``picking``; a field that is absent is left out.

    Off is -1 for ``top_k``, ``top_p``, ``min_p`` and ``seed``, 0 for ``repetition_penalty`` and its window; a window
    of -1 is the whole context. ``top_p`` 0 keeps the most likely token only, as OpenAI and llama.cpp define it.
    """
    asked: dict[str, Any] = {}
    for field, ours, least, most in _NUMBERS:
        if (number := _number(body, field, least, most)) is not None:
            asked[ours] = number
    if (top_k := _integer(body, "top_k", -1)) is not None:
        asked["top_k"] = max(top_k, 0)
    if "top_p" in asked and asked["top_p"] <= 0:
        if asked.pop("top_p") == 0:
            asked["top_k"] = 1
        else:
            asked["top_p"] = 1.0
    if "min_p" in asked:
        asked["min_p"] = max(asked["min_p"], 0.0)
    if "repetition_penalty" in asked:
        asked["repetition_penalty"] = asked["repetition_penalty"] or 1.0
    for field in _WINDOWS:
        if (window := _integer(body, field, -1)) == 0:
            asked["repetition_penalty"] = 1.0
        elif window is not None:
            asked["repetition_context_size"] = window
    if (seed := _integer(body, "seed")) is not None:
        asked["seed"] = None if seed == -1 else seed % 2**64
    if biases := _logit_bias(body):
        asked["logit_bias"] = biases
    return asked


def _logit_bias(body: Body) -> dict[int, float]:
    biases = body.get("logit_bias")
    if biases is None:
        return {}
    if not isinstance(biases, dict):
        raise _wrong("logit_bias", biases, "an object from token ids to numbers between -100 and 100")
    if len(biases) > MOST_BIASES:
        raise ApiError(400, f"logit_bias has {len(biases)} tokens; up to {MOST_BIASES} are supported")
    out = {}
    for key in biases:
        # int() would also take signs, spaces and digits of other scripts.
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise ApiError(400, f"logit_bias: {_shown(key)} is not a token id")
        bias = _number(biases, key, -100, 100, name=f"logit_bias.{key}")
        if bias is not None:
            out[int(key)] = bias
    return out


def max_tokens(body: Body, least: int = 1) -> int | None:
    """The limit of an answer, in tokens; None for no limit, which a negative number asks for, too.

    Args:
        least: the lowest limit that makes sense.
    """
    for field in LENGTHS:
        if (limit := _integer(body, field)) is not None:
            if 0 <= limit < least:
                raise _wrong(field, limit, f"at least {least}, or -1 for no limit")
            return limit if limit >= 0 else None
    return None


def choices(body: Body, prompts: int = 1) -> int:
    """The number of answers to each of ``prompts`` prompts."""
    count = _integer(body, "n", 1)
    count = 1 if count is None else count
    if count * prompts > MOST_CHOICES:
        raise ApiError(
            400,
            f"n: {count * prompts} answers (n times the number of prompts) are not supported in one request, "
            f"only up to {MOST_CHOICES}",
        )
    if _integer(body, "best_of") not in (None, count):
        raise ApiError(400, "best_of is not supported, except where it equals n")
    return count


def stop(body: Body) -> list[str]:
    """The sequences that end the answer's text."""
    sequences: list[str] = []
    for field in ("stop", "stop_sequences"):
        value = body.get(field)
        value = [value] if isinstance(value, str) else value or []
        if not isinstance(value, list) or not all(isinstance(s, str) for s in value):
            raise _wrong(field, value, "a text or a list of texts")
        sequences += value
    return sequences


# Thinking

_OFF = {"none", "off", "disabled", "false", "no"}
_ON = {"on", "enabled", "adaptive", "auto", "true", "yes", "default"}
# From the weakest to the strongest.
_THINKING = ("reasoning_effort", "reasoning", "think", "thinking", "enable_thinking")


def thinking(body: Body) -> dict[str, Any]:
    """Variables of the chat template: ``enable_thinking``, ``reasoning_effort`` and all of ``chat_template_kwargs``.

    Without a wish it is empty, and the template's own default counts.
    """
    variables: dict[str, Any] = {}
    # Anthropic's effort says how much to think, not whether to.
    effort = _object(body, "output_config").get("effort")
    if isinstance(effort, str):
        variables["reasoning_effort"] = effort
    for field in _THINKING:
        variables |= _thinking(field, body.get(field))
    return variables | _object(body, "chat_template_kwargs")


def _thinking(field: str, value: Any) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    if isinstance(value, bool):
        return {"enable_thinking": value}
    if isinstance(value, str):
        word = value.lower()
        if word in _OFF | _ON:
            return {"enable_thinking": word in _ON}
        return {"enable_thinking": True, "reasoning_effort": value}
    if isinstance(value, dict) and field in ("reasoning", "thinking"):
        variables: dict[str, Any] = {}
        for part in ("effort", "type", "enabled"):
            variables |= _thinking(f"{field}.{part}", value.get(part))
        return variables
    raise _wrong(field, value, "true, false or a text such as none, low, medium or high")


# The form of an answer

_FORMS = ("text", "json_object", "json_schema")
_SCHEMAS = ("format", "guided_json", "json_schema")
_GRAMMARS = ("guided_regex", "guided_choice", "guided_grammar", "grammar")


def answer_schema(body: Body) -> Any:
    """The JSON schema that the answer keeps to; None where the answer is free text.

    A form that cannot be kept to is refused, by whatever name it comes.
    """
    structured = _object(body, "structured_outputs")
    for field in _GRAMMARS:
        if body.get(field):
            raise _no_form(field)
    for field in structured:
        if field != "json" and structured[field]:
            raise _no_form(f"structured_outputs.{field}")
    found = [(field, schema) for field, schema in _schemas(body, structured) if schema is not None]
    for field, schema in found[1:]:
        if schema != found[0][1]:
            raise ApiError(400, f"{found[0][0]} and {field} ask for answers of different forms: give one")
    return found[0][1] if found else None


def _schemas(body: Body, structured: Body) -> Iterator[tuple[str, Any]]:
    yield "response_format", _form("response_format", body.get("response_format"))
    for outer in ("text", "output_config"):
        # Elsewhere "text" may be a text.
        if isinstance(body.get(outer), dict):
            yield f"{outer}.format", _form(f"{outer}.format", body[outer].get("format"))
    yield "output_format", _form("output_format", body.get("output_format"))
    for field in _SCHEMAS:
        yield field, _form(field, body.get(field), bare=True)
    yield "structured_outputs.json", _form("structured_outputs.json", structured.get("json"), bare=True)


def _form(field: str, form: Any, bare: bool = False) -> Any:
    """The schema of a form.

    Args:
        bare: the form may be a schema itself, or the JSON text of one.
    """
    if form is None or (bare and form == ""):
        return None
    if bare and isinstance(form, str) and form.lstrip().startswith("{"):
        try:
            form = json.loads(form)
        except (ValueError, RecursionError) as e:
            raise ApiError(400, f"{field} is not JSON: {e}") from None
    kind = form.get("type") if isinstance(form, dict) else form
    kind = "json_object" if kind == "json" else kind
    if kind == "text":
        return None
    if not isinstance(form, dict):
        if kind == "json_object":
            return {"type": "object"}
    elif kind == "json_object":
        return (
            _schema(f"{field}.schema", form["schema"])
            if form.get("schema") is not None
            else {"type": "object"}
        )
    elif kind == "json_schema":
        inner = form.get("json_schema")
        if isinstance(inner, dict):
            return _schema(f"{field}.json_schema.schema", inner.get("schema"))
        return _schema(f"{field}.schema", form.get("schema"))
    elif bare:
        return _schema(field, form)
    known = ", ".join(_FORMS)
    raise ApiError(400, f"{field}: an answer of type {_shown(kind)} is not supported, only {known}")


def _schema(field: str, schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        missing = "is missing" if schema is None else f"is {_shown(schema)}"
        raise ApiError(400, f"{field} {missing}: give a JSON schema, an object")
    return schema


def _no_form(field: str) -> ApiError:
    return ApiError(400, f"{field} is not supported: give a JSON schema as response_format")


# Tools by their older names, and fields that are refused


def tools(body: Body) -> tuple[list[dict[str, Any]], Any]:
    """Tools and tool_choice of a chat completion; ``functions`` and ``function_call`` count as these.

    Answers carry ``tool_calls`` by either name.
    """
    offered = list(body.get("tools") or [])
    choice = body.get("tool_choice")
    functions = body.get("functions")
    if functions is not None and not isinstance(functions, list):
        raise _wrong("functions", functions, "a list of functions")
    offered += [{"type": "function", "function": function} for function in functions or []]
    call = body.get("function_call")
    if choice is None and call is not None:
        if not isinstance(call, str | dict):
            raise _wrong("function_call", call, "none, auto or an object with a name")
        choice = call if isinstance(call, str) else {"type": "function", "function": call}
    return offered, "auto" if choice is None else choice


def check_supported(body: Body) -> None:
    """Refuses the fields that would change the answer and are not supported."""
    if body.get("suffix"):
        raise ApiError(400, "suffix is not supported: a text is continued at its end only")
    modalities = body.get("modalities") or []
    if body.get("audio") is not None or (
        isinstance(modalities, list) and set(map(str, modalities)) - {"text"}
    ):
        raise ApiError(400, "answers other than text are not supported (modalities, audio)")
    if body.get("use_beam_search"):
        raise ApiError(400, "use_beam_search is not supported: answers are sampled token by token")


# Values


def _number(body: Body, field: str, least: float, most: float, name: str | None = None) -> float | None:
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _wrong(name or field, value, f"a number between {least} and {most}")
    return float(value)


def _integer(body: Body, field: str, least: int | None = None) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    if not whole or (least is not None and value < least):
        raise _wrong(field, value, "a whole number" + ("" if least is None else f" of at least {least}"))
    return int(value)  # 40.0 is an integer to JSON


def _object(body: Body, field: str) -> dict[str, Any]:
    value = body.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(field, value, "an object")
    return value


def _wrong(field: str, value: Any, right: str) -> ApiError:
    return ApiError(400, f"{field} should be {right}, but is {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else text[:100] + " …"
