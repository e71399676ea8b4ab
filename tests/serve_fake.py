"""The real server, with a model that says what the last message of its prompt tells it to.

SAY(text)   the answer
FOREVER     the answer again and again
SLOWLY      a twentieth of a second per token
LATE(3)     three seconds before the first token
BREAK       an error instead of a second token
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from fakes import FakeCache, FakeModel, make_checkpoint

from mlx_flashmoe.errors import ReadError
from mlx_flashmoe.server import engine
from mlx_flashmoe.server.app import serve
from mlx_flashmoe.tokenizer import Tokenizer

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.reasoning_content or '') + message.content }}
{%- for call in message.tool_calls or [] %}
{{- call.function.name + ': ' }}{{ call.function.arguments | tojson }}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""


class ObedientModel(FakeModel):
    identity = "00"
    vocab_size = FakeModel.vocab

    def __init__(self, tokenizer: Tokenizer, max_context: int) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.max_context = max_context

    def reserve(self, context: int) -> None:
        assert context <= self.max_context

    def stats(self) -> Any:
        return SimpleNamespace(bytes_read=1000, hits=3, misses=1)

    def make_cache(self) -> list[Any]:
        cache: Any = FakeCache()
        cache.seen, cache.prompt = [], 0
        return [cache]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        (state,) = cache
        state.seen += tokens[0].tolist()
        logits = np.zeros((1, tokens.shape[1], self.vocab), np.float32)
        if tokens.shape[1] == 1:  # the last token of a prompt comes by itself, too
            state.prompt = state.prompt or len(state.seen)
            logits[0, 0, self._next(state.seen[: state.prompt], len(state.seen) - state.prompt)] = 20
        return mx.array(logits)

    def _next(self, prompt: list[int], said: int) -> int:
        order = self._tokenizer.decode(prompt).rpartition("<|im_start|>")[0].rpartition("<|im_start|>")[2]
        text = order.partition("SAY(")[2].rpartition(")")[0] or "Nothing."
        script = self._tokenizer.encode(text)
        if "SLOWLY" in order:
            time.sleep(0.05)
        if (late := re.search(r"LATE\((\d+)\)", order)) and not said:
            time.sleep(int(late[1]))
        if "BREAK" in order and said:
            raise ReadError("layer 3, expert 4: the disk is gone")
        if "FOREVER" in order:
            said %= len(script)
        (end,) = self._tokenizer.eos_token_ids
        return script[said] if said < len(script) else end


def load(template: str, max_context: int) -> tuple[ObedientModel, Tokenizer]:
    tokenizer = Tokenizer(
        make_checkpoint.build_tokenizer(),
        special_tokens={"eos_token": "<|im_end|>"},
        chat_templates={"default": template},
    )
    return ObedientModel(tokenizer, max_context), tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("key", nargs="?")
    parser.add_argument("--template", type=Path, help="a chat template; by default one that refuses nothing")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--keep-alive", type=float, default=0.1)
    arguments = parser.parse_args()
    engine.KEEP_ALIVE = arguments.keep_alive
    template = arguments.template.read_text() if arguments.template else TEMPLATE
    serve(
        lambda: load(template, arguments.context),
        "obedient",
        host="127.0.0.1",
        port=0,
        api_key=arguments.key,
        sampling={"temp": 0.0},
        announce=lambda line: print(line, flush=True),
    )
