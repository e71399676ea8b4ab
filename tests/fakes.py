"""A tokenizer and models small enough to know every answer of."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flashmoe.facts import Facts
from mlx_flashmoe.loader import Stats
from mlx_flashmoe.models.cache import Cache
from mlx_flashmoe.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import make_checkpoint


def tokenizer() -> Tokenizer:
    """The example checkpoint's tokenizer with its template."""
    return Tokenizer(
        make_checkpoint.build_tokenizer(),
        special_tokens={"eos_token": "<|im_end|>"},
        chat_templates={"default": make_checkpoint.TEMPLATE},
    )


class FakeCache(Cache):
    """Holds a number, as an array."""

    def __init__(self) -> None:
        self.value = mx.array(0)


class FakeModel:
    """Base of the fakes: what ``load`` returns, as far as the token loop is concerned."""

    vocab = 768
    context_length = 4096
    plan = "memory: none"
    facts = Facts("fake_moe", 1_800_000, 4, 1_000_000)

    def __init__(self) -> None:
        self.calls: list[int] = []

    def make_cache(self) -> list[FakeCache]:
        return [FakeCache()]

    def reserve(self, context: int) -> None:
        pass

    def stats(self) -> Stats:
        calls = len(self.calls)
        return Stats(1000 * calls, calls, 3 * calls, calls, 0.0, 0.0, 0.0)

    def __call__(self, tokens: mx.array, cache: list[FakeCache]) -> mx.array:
        assert tokens.ndim == 2 and tokens.shape[0] == 1
        self.calls.append(tokens.shape[1])
        return mx.stack([self.step(t, cache[0]) for t in tokens[0].tolist()])[None]

    def step(self, token: int, cache: FakeCache) -> mx.array:
        raise NotImplementedError


class ScriptedModel(FakeModel):
    """Says the same thing whatever it is asked."""

    def __init__(self, prompt_tokens: int, script: list[int]) -> None:
        super().__init__()
        self.prompt_tokens, self.script = prompt_tokens, script

    def step(self, token: int, cache: FakeCache) -> mx.array:
        cache.offset += 1
        place = cache.offset - self.prompt_tokens
        logits = np.zeros(self.vocab, np.float32)
        if 0 <= place < len(self.script):
            logits[self.script[place]] = 20
        return mx.array(logits)


class HashModel(FakeModel):
    """Its logits depend on every token so far and on their order."""

    def step(self, token: int, cache: FakeCache) -> mx.array:
        cache.value = (cache.value * 31 + token + 1) % 65521
        seed = int(cache.value.item())
        return mx.array(np.random.default_rng(seed).standard_normal(self.vocab).astype(np.float32))


class TalkingModel(FakeModel):
    """Gives its answers in turn, each to a prompt that ends by opening a thinking part, as the example's does."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        text = tokenizer()
        self.opening = text.encode("assistant\n<think>\n")
        end = text.token_id("<|im_end|>")
        self.answers = [[*text.encode(answer), end] for answer in answers]

    def step(self, token: int, cache: FakeCache) -> mx.array:
        seen = [*getattr(cache, "seen", ()), token][-len(self.opening) :]
        cache.seen = seen  # type: ignore[attr-defined]
        if seen == self.opening:
            cache.script = self.answers.pop(0)  # type: ignore[attr-defined]
        script = getattr(cache, "script", [])
        logits = np.zeros(self.vocab, np.float32)
        if script:
            logits[script[0]] = 20
            cache.script = script[1:]  # type: ignore[attr-defined]
        return mx.array(logits)
