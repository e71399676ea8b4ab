"""Hermes, and Qwen before 3.5: a JSON object.

<tool_call>
{"name": "get_weather", "arguments": {"place": "Zürich"}}
</tool_call>
"""

from __future__ import annotations

from mlx_flashmoe.tools.json_calls import JsonForm
from mlx_flashmoe.tools.marks import SPACE, mark
from mlx_flashmoe.tools.syntax import Syntax, Wrapping

JSON_FORM = JsonForm(
    [mark("<tool_call>", SPACE, "{")], ["</tool_call>"], bare=mark("{", SPACE, '"name"', SPACE, ":")
)
WRAPPING = Wrapping(None, "", "\n</tool_call>", start="", between="\n")
HERMES = Syntax("hermes", marks=("<tool_call>", "</tool_call>"), forms=(JSON_FORM,), json=WRAPPING)
