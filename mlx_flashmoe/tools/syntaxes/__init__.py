"""The syntaxes that are read, one page each, and which of them a checkpoint's chat template writes."""

from __future__ import annotations

from mlx_flashmoe.tools.syntax import Syntax
from mlx_flashmoe.tools.syntaxes.hermes import HERMES
from mlx_flashmoe.tools.syntaxes.qwen import QWEN

# What only one syntax's template says, the most particular first.
_SIGNS = (("<function=", QWEN), ("<tool_call>", HERMES))


def syntax_of(chat_template: str) -> Syntax:
    """The syntax that a chat template writes calls in; Qwen's, which reads two forms, if it says nothing of calls."""
    return next((syntax for sign, syntax in _SIGNS if sign in chat_template), QWEN)
