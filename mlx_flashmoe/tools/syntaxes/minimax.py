"""MiniMax-M2: one section, with an invocation for each call.

<minimax:tool_call>
<invoke name="get_weather">
<parameter name="place">Zürich</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from mlx_flashmoe.tools.json_calls import JsonForm
from mlx_flashmoe.tools.marks import SPACE, Field, TagMarks, mark
from mlx_flashmoe.tools.syntax import Syntax, TagForm, Wrapping

_NAME = Field(chars=r'[^"<>\n]')
_START, _END = "<minimax:tool_call>", "</minimax:tool_call>"
# With arguments that tags cannot promise, a forced call has them as one JSON object.
_JSON = JsonForm([mark('<invoke name="', _NAME, '">', SPACE, "{")], ["</invoke>", _END])
_JSON_FIRST = JsonForm([mark(_START, SPACE, '<invoke name="', _NAME, '">', SPACE, "{")], ["</invoke>", _END])
MINIMAX = Syntax(
    "minimax",
    marks=(_START, _END),
    forms=(
        _JSON_FIRST,
        _JSON,
        TagForm(
            TagMarks(
                section=_START,
                function=mark('<invoke name="', _NAME, '">'),
                parameter=mark('<parameter name="', _NAME, '">'),
                parameter_end="</parameter>",
                function_end="</invoke>",
                section_end=_END,
                grouped=True,
                trim=False,
            )
        ),
    ),
    json=Wrapping('<invoke name="', '">\n', "\n</invoke>\n", start=_START + "\n", end=_END, between=""),
)
