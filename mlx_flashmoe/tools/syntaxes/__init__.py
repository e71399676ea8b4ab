"""The syntaxes that are read, one page each, and which of them a checkpoint's chat template writes."""

from __future__ import annotations

from mlx_flashmoe.tools.syntax import Syntax
from mlx_flashmoe.tools.syntaxes.deepseek import DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_V32
from mlx_flashmoe.tools.syntaxes.glm import GLM
from mlx_flashmoe.tools.syntaxes.harmony import HARMONY
from mlx_flashmoe.tools.syntaxes.hermes import HERMES
from mlx_flashmoe.tools.syntaxes.kimi import KIMI
from mlx_flashmoe.tools.syntaxes.minimax import MINIMAX
from mlx_flashmoe.tools.syntaxes.qwen import QWEN

# Words in the template of each syntax, the most particular first.
_SIGNS = (
    (("<|channel|>",), HARMONY),
    (("<minimax:tool_call>",), MINIMAX),
    (("<|tool_calls_section_begin|>",), KIMI),
    (("｜DSML｜",), DEEPSEEK_V32),
    (("<｜tool▁sep｜>", "```json"), DEEPSEEK_V3),
    (("<｜tool▁sep｜>",), DEEPSEEK_V31),
    (("<arg_key>",), GLM),
    (("<function=",), QWEN),
    (("<tool_call>",), HERMES),
)


def syntax_of(chat_template: str) -> Syntax:
    """The syntax that a chat template writes calls in; Qwen's, which reads two forms, if it says nothing of calls."""
    return next((syntax for signs, syntax in _SIGNS if all(sign in chat_template for sign in signs)), QWEN)
