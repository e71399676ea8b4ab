"""The real server with a model that follows ``agent.py``, for clients as they come from their registries.

    python tests/clients/serve_agent.py --template chat_template.jinja --record requests/

It listens on a free port and prints its address. The prefix cache is the real one, so that ``usage`` and /metrics
tell what a second turn had to read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from clients import agent
from clients.harness import CONTEXT
from clients.record import Recorder
from fakes import FakeModel, make_checkpoint

from mlx_flashmoe.models.cache import Cache
from mlx_flashmoe.prefix_cache import PrefixCache
from mlx_flashmoe.server import app
from mlx_flashmoe.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
OWN = REPOSITORY / "examples" / "small_moe" / "model" / "chat_template.jinja"


class AgentCache(Cache):
    """The tokens seen, which is all that the script needs."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.script: list[int] | None = None

    def see(self, tokens: mx.array) -> None:
        self.tokens += tokens[0].tolist()  # type: ignore[arg-type]
        self.offset = len(self.tokens)

    def snapshot(self) -> dict[str, mx.array]:
        return {"tokens": mx.array(np.asarray(self.tokens, np.int32))}

    def restore(self, snapshot: dict[str, mx.array], offset: int) -> None:
        self.tokens = snapshot["tokens"].tolist()  # type: ignore[assignment]
        self.offset = offset


class AgentModel(FakeModel):
    """What ``load`` returns, as far as the server is concerned."""

    identity = "00"
    max_context = context_length = CONTEXT

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size

    def make_cache(self) -> list[Any]:
        return [AgentCache()]

    def read(self, tokens: mx.array, cache: list[Any]) -> None:
        cache[0].see(tokens)

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        (state,) = cache
        state.see(tokens)
        if state.script is None:  # these were the prompt's last tokens: the script begins
            (end,) = self._tokenizer.eos_token_ids
            state.script = [*self._tokenizer.encode(agent.answer(self._tokenizer.decode(state.tokens))), end]
        logits = np.zeros((1, tokens.shape[1], self.vocab_size), np.float32)
        logits[0, -1, state.script.pop(0)] = 20
        return mx.array(logits)


def load(template: Path) -> tuple[AgentModel, Tokenizer]:
    """The model and a byte-level tokenizer with a chat template of the Qwen3.5 family."""
    tokenizer = Tokenizer(
        make_checkpoint.build_tokenizer(),
        special_tokens={"eos_token": "<|im_end|>"},
        chat_templates={"default": template.read_text(encoding="utf-8")},
    )
    return AgentModel(tokenizer), tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--template", type=Path, default=OWN)
    parser.add_argument("--record", type=Path, help="folder for the requests, one JSON file each")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.record is not None:
        build = app.build
        app.build = lambda *given: Recorder(build(*given), options.record)  # type: ignore[assignment, return-value]
    app.serve(
        lambda: load(options.template),
        "scripted",
        host="127.0.0.1",
        port=options.port,
        sampling={"temp": 0.0},
        make_prefix_cache=lambda model, tokenizer: PrefixCache(model.identity, tokenizer.message_start_id),
        announce=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
