"""Qwen3.5 and Qwen3-Coder: tags around plain text. Now and then these models write the JSON form instead.

<tool_call>
<function=get_weather>
<parameter=place>
Zürich
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

from mlx_flashmoe.tools.marks import Field, TagMarks, mark
from mlx_flashmoe.tools.syntax import Syntax, TagForm
from mlx_flashmoe.tools.syntaxes.hermes import JSON_FORM, WRAPPING

MARKS = TagMarks(
    section="<tool_call>",
    function=mark("<function=", Field(), ">"),
    parameter=mark("<parameter=", Field(), ">"),
    parameter_end="</parameter>",
    function_end="</function>",
    section_end="</tool_call>",
)
QWEN = Syntax(
    "qwen",
    marks=("<tool_call>", "</tool_call>"),
    forms=(JSON_FORM, TagForm(MARKS)),
    json=WRAPPING,
    tags=MARKS,
)
