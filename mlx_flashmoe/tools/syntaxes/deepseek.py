"""DeepSeek. V3 and R1 write JSON in a code block, V3.1 bare JSON, both after a name, and V3.2 tags.

V3:   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
      ```json
      {"place": "Zürich"}
      ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
V3.1: <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"place": "Zürich"}<｜tool▁call▁end｜>
      <｜tool▁calls▁end｜>
V3.2: <｜DSML｜function_calls>
      <｜DSML｜invoke name="get_weather">
      <｜DSML｜parameter name="place" string="true">Zürich</｜DSML｜parameter>
      </｜DSML｜invoke>
      </｜DSML｜function_calls>
"""

from __future__ import annotations

from mlx_flashmoe.tools.json_calls import JsonForm
from mlx_flashmoe.tools.marks import SPACE, Field, TagMarks, mark
from mlx_flashmoe.tools.syntax import Syntax, TagForm, Wrapping

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_MARKS = (_CALLS, _CALL, _SEPARATOR, _CALL_END, _CALLS_END)

_V3_PARTS = (_CALL, SPACE, "function" + _SEPARATOR, Field(), SPACE, "```json", SPACE, "{")
_V31_PARTS = (_CALL, SPACE, Field(), _SEPARATOR, SPACE, "{")
_V3_FORM = JsonForm(
    [mark(_CALLS, SPACE, *_V3_PARTS), mark(*_V3_PARTS)], ["```", _CALL_END, _CALLS_END], certain=True
)
_V31_FORM = JsonForm(
    [mark(_CALLS, SPACE, *_V31_PARTS), mark(*_V31_PARTS)], [_CALL_END, _CALLS_END], certain=True
)
DEEPSEEK_V3 = Syntax(
    "deepseek-v3",
    marks=_MARKS,
    forms=(_V3_FORM, _V31_FORM),
    json=Wrapping(f"{_CALL}function{_SEPARATOR}", "\n```json\n", f"\n```{_CALL_END}", _CALLS, _CALLS_END),
)
DEEPSEEK_V31 = Syntax(
    "deepseek-v3.1",
    marks=_MARKS,
    forms=(_V3_FORM, _V31_FORM),
    json=Wrapping(_CALL, _SEPARATOR, _CALL_END, _CALLS, _CALLS_END, between=""),
)

_NAME = Field(chars=r'[^"<>\n]')
_DSML, _DSML_END = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
_INVOKE, _INVOKE_END = '<｜DSML｜invoke name="', "</｜DSML｜invoke>"
_OPENING = (_INVOKE, _NAME, '">', SPACE, "{")
DEEPSEEK_V32 = Syntax(
    "deepseek-v3.2",
    marks=(_DSML, _DSML_END, "｜DSML｜"),
    forms=(
        # With arguments that tags cannot promise, a forced call has them as one JSON object.
        JsonForm([mark(_DSML, SPACE, *_OPENING), mark(*_OPENING)], [_INVOKE_END, _DSML_END]),
        TagForm(
            TagMarks(
                section=_DSML,
                function=mark(_INVOKE, _NAME, '">'),
                parameter=mark(
                    '<｜DSML｜parameter name="', _NAME, '" string="', Field("string", "[a-z]"), '">'
                ),
                parameter_end="</｜DSML｜parameter>",
                function_end=_INVOKE_END,
                section_end=_DSML_END,
                grouped=True,
                trim=False,
            )
        ),
    ),
    json=Wrapping(_INVOKE, '">\n', f"\n{_INVOKE_END}\n", start=_DSML + "\n", end=_DSML_END, between=""),
)
