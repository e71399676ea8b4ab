"""The likelihood of a prompt, against logits computed at once; and what follows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fakes import HashModel, tokenizer

from mlx_flashmoe import convert, load, scoring
from mlx_flashmoe.generate import generate_step, stream_generate
from mlx_flashmoe.sampling import make_logits_processors
from mlx_flashmoe.scoring import prompt_infos, row_logprobs, token_infos

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import make_checkpoint

PROMPT = tokenizer().encode("The boat came back in the evening, and nobody was on it.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("scored")
    make_checkpoint.write_checkpoint(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "model", q_bits=8)
    return load(folder / "model")[0]


def log_softmax(logits: mx.array) -> np.ndarray:
    values = np.array(logits.astype(mx.float32), np.float64)
    return (
        values
        - np.log(np.exp(values - values.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - values.max(-1, keepdims=True)
    )


@pytest.mark.parametrize(("chunk", "rows"), [(2048, 1000), (2048, 3), (5, 2), (1, 1)])
def test_against_logits_computed_at_once(
    model: Any, chunk: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "prefill_chunk", chunk)
    monkeypatch.setattr(scoring, "PIECE_BYTES", 4 * model.vocab_size * rows)
    expected = log_softmax(model(mx.array(PROMPT)[None], model.make_cache())[0])
    done: list[int] = []
    infos = list(prompt_infos(model, PROMPT, cache := model.make_cache(), 3, done.append))
    assert [info.token for info in infos] == PROMPT
    assert (infos[0].logprob, infos[0].top) == (None, [])
    own = [info.logprob for info in infos[1:]]
    np.testing.assert_allclose(own, expected[np.arange(len(PROMPT) - 1), PROMPT[1:]], atol=1e-3)
    best = np.sort(expected[:-1], axis=-1)[:, :-4:-1]
    np.testing.assert_allclose([[value for _, value in info.top] for info in infos[1:]], best, atol=1e-3)
    assert done[-1] == len(PROMPT) - 1
    # The last token is left for the token loop, whose first step gives the same as if there had been no scoring.
    (_, following), *_ = generate_step(
        mx.array(PROMPT), model, max_tokens=1, prompt_cache=cache, prompt_read=len(PROMPT) - 1
    )
    np.testing.assert_allclose(following, expected[-1], atol=1e-3)


def test_the_whole_is_never_there(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PIECE_BYTES", 4 * model.vocab_size * 4)
    pieces = [piece.shape for piece in row_logprobs(model, mx.array(PROMPT), model.make_cache())]
    assert sum(rows for rows, _ in pieces) == len(PROMPT)
    assert all(rows <= 4 and width == model.vocab_size for rows, width in pieces)


def test_the_answer_is_the_same_as_without() -> None:
    def answer(**known: Any) -> list[int]:
        steps = stream_generate(
            HashModel(),
            tokenizer(),
            PROMPT,
            max_tokens=20,
            logits_processors=make_logits_processors(2.0, -1, frequency_penalty=1.0),
            **known,
        )
        return [step.token for step in steps]

    cache = HashModel().make_cache()
    assert len(list(prompt_infos(HashModel(), PROMPT, cache, 0))) == len(PROMPT)
    assert answer(prompt_cache=cache, prompt_read=len(PROMPT) - 1) == answer()


def test_the_token_itself_is_among_the_top_with_the_same_number() -> None:
    """lm-eval asks whether a token was the likeliest by comparing the two."""
    logprobs = mx.random.normal((5, 100), key=mx.random.key(1))
    likeliest: Any = logprobs.argmax(-1).tolist()
    for info, token in zip(token_infos(logprobs, mx.array(likeliest), 1), likeliest):
        assert info.top == [(token, info.logprob)]


def test_more_than_the_vocabulary_is_all_of_it() -> None:
    (info,) = token_infos(mx.array([[-1.0, -3.0, -2.0]]), mx.array([1]), 20)
    assert info.top == [(0, -1.0), (2, -2.0), (1, -3.0)]
    assert token_infos(mx.array([[-1.0]]), mx.array([0]), 0)[0].top == []
