"""GLM-4.5 and later: keys and values in tags of their own, a line each or all on one.

<tool_call>get_weather
<arg_key>place</arg_key>
<arg_value>Zürich</arg_value>
</tool_call>
"""

from __future__ import annotations

from mlx_flashmoe.tools.json_calls import JsonForm
from mlx_flashmoe.tools.marks import SPACE, Field, TagMarks, mark
from mlx_flashmoe.tools.syntax import Syntax, TagForm, Wrapping

_NAME = Field(chars=r"[^\s<>{}]", after=r"[\s<]")
# With arguments that tags cannot promise, a forced call has them as one JSON object.
_JSON = JsonForm([mark("<tool_call>", SPACE, Field(chars=r"[^\s<>{}]"), SPACE, "{")], ["</tool_call>"])
GLM = Syntax(
    "glm",
    marks=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    forms=(
        _JSON,
        TagForm(
            TagMarks(
                function=mark("<tool_call>", SPACE, _NAME, SPACE),
                parameter=mark("<arg_key>", Field(), "</arg_key>", SPACE, "<arg_value>"),
                parameter_end="</arg_value>",
                function_end="</tool_call>",
                trim=False,
            )
        ),
    ),
    json=Wrapping("<tool_call>", "\n", "\n</tool_call>"),
)
