"""Thinking, text and tool calls in what a model says, found as it says it.

The design, in the order in which an answer passes through it:

- :mod:`parser` tells thinking from the answer. Thinking that never ends may end in calls.
- :mod:`finder` looks for the openings of calls. Only offered names count, and prose that quotes a call stays prose:
  text stands before and after it on its line, or it stands in a code fence.
- A call in tags (:mod:`tags`) holds plain text, so a value may hold any mark. It is shown while it is written, up to
  the first place where it may have ended; :mod:`ends` chooses among such places when what follows is known. A mark
  that is missing counts as there where the rest makes sense so. What never closes is no call.
- A call in JSON (:mod:`json_calls`) ends where the object ends.
- :mod:`syntaxes` has a page for each syntax: the marks, as data.

Nothing that a model says is lost, except for blank lines before a part of the answer and the white space after it.
"""

from mlx_flashmoe.tools.events import (
    CallDelta,
    CallStart,
    Event,
    Piece,
    Text,
    Thinking,
    Tool,
    ToolCall,
    parameter_schemas,
    pieces,
)
from mlx_flashmoe.tools.parser import AnswerParser, answer_parser, parse_answer
from mlx_flashmoe.tools.syntax import Syntax
from mlx_flashmoe.tools.syntaxes import syntax_of
from mlx_flashmoe.tools.syntaxes.qwen import QWEN

__all__ = [
    "QWEN",
    "AnswerParser",
    "CallDelta",
    "CallStart",
    "Event",
    "Piece",
    "Syntax",
    "Text",
    "Thinking",
    "Tool",
    "ToolCall",
    "answer_parser",
    "parameter_schemas",
    "parse_answer",
    "pieces",
    "syntax_of",
]
