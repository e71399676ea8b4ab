"""Kimi K2: the name with its number in the answer, then JSON.

<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>
{"place": "Zürich"}<|tool_call_end|><|tool_calls_section_end|>
"""

from __future__ import annotations

from mlx_flashmoe.tools.json_calls import JsonForm
from mlx_flashmoe.tools.marks import SPACE, Field, mark
from mlx_flashmoe.tools.syntax import Syntax, Wrapping

_CALLS, _CALLS_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_NUMBERED = (Field(chars=r"[^<>\n:]"), ":", Field("number", "[0-9]"), SPACE, _ARGUMENTS, SPACE, "{")
_PARTS = [(_CALL, SPACE, "functions.", *_NUMBERED), (_CALL, SPACE, *_NUMBERED)]
KIMI = Syntax(
    "kimi",
    marks=(_CALLS, _CALL, _ARGUMENTS, _CALL_END, _CALLS_END),
    forms=(
        JsonForm(
            [pattern for parts in _PARTS for pattern in (mark(_CALLS, SPACE, *parts), mark(*parts))],
            [_CALL_END, _CALLS_END],
            certain=True,
        ),
    ),
    json=Wrapping(f"{_CALL}functions.", f":0{_ARGUMENTS}", _CALL_END, _CALLS, _CALLS_END, between=""),
)
