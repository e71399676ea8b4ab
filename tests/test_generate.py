"""The token loop, over models whose every answer is known."""

import time

import mlx.core as mx
import pytest
from fakes import FakeCache, FakeModel, HashModel, ScriptedModel, tokenizer

from mlx_flashmoe.errors import RequestError
from mlx_flashmoe.generate import cut_off, generate, generate_step, stream_generate
from mlx_flashmoe.sampling import make_logits_processors

TOKENIZER = tokenizer()
EOS = TOKENIZER.token_id("<|im_end|>")


def scripted(text: str, prompt: list[int], end: bool = True) -> ScriptedModel:
    return ScriptedModel(len(prompt), TOKENIZER.encode(text) + ([EOS] if end else []))


def test_streams_the_text_and_stops_at_the_end_token() -> None:
    prompt, text = TOKENIZER.encode("Hello?"), "Three red boats — 你好 🚢."
    model = scripted(text, prompt)
    responses = list(stream_generate(model, TOKENIZER, prompt, max_tokens=500))
    assert "".join(r.text for r in responses) == text
    assert [r.finish_reason for r in responses] == [None] * (len(responses) - 1) + ["stop"]
    assert [r.token for r in responses] == model.script
    assert [r.generation_tokens for r in responses] == list(range(1, len(model.script) + 1))
    assert all("\ufffd" not in r.text for r in responses)
    last = responses[-1]
    assert last.prompt_tokens == len(prompt)
    assert last.prompt_tps > 0 and last.generation_tps > 0 and last.peak_memory >= 0
    assert last.logprobs.shape == (model.vocab,)
    assert last.logprobs.argmax().item() == EOS
    assert mx.logsumexp(last.logprobs).item() == pytest.approx(0, abs=1e-5)


def test_stops_at_max_tokens_with_all_text_out() -> None:
    prompt = TOKENIZER.encode("Hello?")
    ids = TOKENIZER.encode("🚢🚢")
    cut = ids[:1]  # in the middle of a character
    model = ScriptedModel(len(prompt), ids)
    responses = list(stream_generate(model, TOKENIZER, prompt, max_tokens=1))
    assert [r.finish_reason for r in responses] == ["length"]
    assert responses[0].text == TOKENIZER.decode(cut) == "\ufffd"
    assert len(model.calls) == 2  # the prompt but its last token, and one step: none too many


def test_prompt_is_text_ids_or_an_array() -> None:
    prompt = "The boat came"
    ids = TOKENIZER.encode(prompt)
    answers = {
        generate(HashModel(), TOKENIZER, form, max_tokens=12)
        for form in (prompt, ids, tuple(ids), mx.array(ids))
    }
    assert len(answers) == 1


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_prefill_step_size_changes_nothing_but_the_calls(step: int) -> None:
    ids = TOKENIZER.encode("The lighthouse keeper wrote 12 letters!")
    assert len(ids) > 8
    expected = [t for t, _ in generate_step(mx.array(ids), HashModel(), max_tokens=9)]
    model, seen = HashModel(), []
    tokens = generate_step(
        mx.array(ids),
        model,
        max_tokens=9,
        prefill_step_size=step,
        prompt_progress_callback=lambda done, total: seen.append((done, total)),
    )
    assert [t for t, _ in tokens] == expected
    rest = len(ids) - 1
    chunks = [min(step, rest - i) for i in range(0, rest, step)]
    assert model.calls == chunks + [1] * 9
    assert seen[0] == (0, len(ids)) and seen[-1] == (len(ids), len(ids))
    assert [done for done, _ in seen[1:-1]] == [sum(chunks[: i + 1]) for i in range(len(chunks))]


def test_a_cache_carries_on() -> None:
    ids = TOKENIZER.encode("The boat came and took the letters away.")
    whole = [t for t, _ in generate_step(mx.array(ids), HashModel(), max_tokens=6)]
    model = HashModel()
    cache = model.make_cache()
    model(mx.array([ids[:4]]), cache)
    assert [t for t, _ in generate_step(mx.array(ids[4:]), model, max_tokens=6, prompt_cache=cache)] == whole
    # It holds the prompt and every token but the last, which the next call would begin with.
    more = generate_step(mx.array(whole[-1:]), model, max_tokens=3, prompt_cache=cache)
    longer = [t for t, _ in generate_step(mx.array(ids), HashModel(), max_tokens=9)]
    assert [t for t, _ in more] == longer[6:]


def test_closing_in_the_middle_is_clean() -> None:
    model = HashModel()
    stream = stream_generate(model, TOKENIZER, "The boat", max_tokens=-1)
    for _ in range(3):
        next(stream)
    calls = len(model.calls)
    stream.close()
    assert len(model.calls) == calls
    assert list(stream) == []


def test_no_limit_ends_at_the_end_token() -> None:
    prompt = TOKENIZER.encode("Hello?")
    text = "word " * 100
    assert generate(scripted(text, prompt), TOKENIZER, prompt, max_tokens=-1) == text


def test_logits_processors_see_prompt_and_answer() -> None:
    seen = []

    def look(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    ids = TOKENIZER.encode("The boat came")
    tokens = [t for t, _ in generate_step(mx.array(ids), HashModel(), max_tokens=3, logits_processors=[look])]
    assert seen == [ids, ids + tokens[:1], ids + tokens[:2]]


class TwoWords(FakeModel):
    """Token 5 is always a little more likely than token 9, and nothing else is."""

    def step(self, token: int, cache: FakeCache) -> mx.array:
        return mx.where(mx.arange(self.vocab) == 5, 2.0, mx.where(mx.arange(self.vocab) == 9, 1.5, -9.0))


@pytest.mark.parametrize(("penalty", "expected"), [(None, [5, 5, 5, 5]), (2.0, [5, 9, 5, 5])])
def test_repetition_penalty_counts_what_was_generated(penalty: float | None, expected: list[int]) -> None:
    steps = generate_step(
        mx.array([1, 2]), TwoWords(), max_tokens=4, logits_processors=make_logits_processors(penalty)
    )
    assert [t for t, _ in steps] == expected


def test_sampler_gets_logprobs() -> None:
    def sampler(logprobs: mx.array) -> mx.array:
        assert logprobs.shape == (1, HashModel.vocab)
        assert mx.logsumexp(logprobs).item() == pytest.approx(0, abs=1e-4)
        return mx.argmin(logprobs, axis=-1)

    greedy = generate(HashModel(), TOKENIZER, "The boat", max_tokens=5)
    assert generate(HashModel(), TOKENIZER, "The boat", max_tokens=5, sampler=sampler) != greedy


@pytest.mark.parametrize("prompt", ["", [], mx.array([], mx.int32)])
def test_empty_prompt(prompt) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        generate(HashModel(), TOKENIZER, prompt)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"max_tokens": 0}, "--max-tokens"),
        ({"max_tokens": -2}, "--max-tokens"),
        ({"prefill_step_size": 0}, "--prefill-"),
    ],
)
def test_counts_out_of_range_name_the_flag(options: dict, flag: str) -> None:
    with pytest.raises(RequestError, match=flag):
        generate(HashModel(), TOKENIZER, "The boat", **options)


def test_verbose_prints_text_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = TOKENIZER.encode("Hello?")
    text = generate(scripted("Three boats.", prompt), TOKENIZER, prompt, verbose=True)
    out = capsys.readouterr().out
    assert text == "Three boats."
    assert out.startswith("Three boats.\nPrompt: ") and "Generation: " in out and "Peak memory: " in out


def test_the_model_says_how_long_its_prompt_chunks_may_be() -> None:
    model = HashModel()
    model.prefill_chunk = 3  # type: ignore[attr-defined]
    list(generate_step(mx.arange(8), model, max_tokens=1))
    assert model.calls == [3, 3, 1, 1]


def test_the_rate_of_a_short_answer_counts_the_work_for_it() -> None:
    class Slow(HashModel):
        resident = True

        def __call__(self, tokens: mx.array, cache: list) -> mx.array:
            time.sleep(0.05)
            return super().__call__(tokens, cache)

    for count in (2, 3):
        *_, last = stream_generate(Slow(), TOKENIZER, [1, 2, 3], count)
        assert 0 < last.generation_tps <= 20


@pytest.mark.parametrize("max_tokens", [-1, 100])
def test_an_answer_ends_where_the_context_does(max_tokens: int) -> None:
    model = HashModel()
    model.max_context = 20  # type: ignore[attr-defined]
    prompt = list(range(8))
    responses = list(stream_generate(model, TOKENIZER, prompt, max_tokens))
    assert (len(responses), responses[-1].finish_reason) == (12, "length")
    note = cut_off(responses[-1], max_tokens)
    assert note == "the answer was cut off: the context of 20 tokens is full"
    assert len(list(generate_step(mx.array(prompt), model, max_tokens=max_tokens))) == 12
    assert cut_off(list(stream_generate(model, TOKENIZER, prompt, 5))[-1], 5) == (
        "the answer was cut off after 5 tokens (--max-tokens)"
    )
    # What went before counts, too.
    cache = model.make_cache()
    cache[0].offset = 10
    assert len(list(stream_generate(model, TOKENIZER, prompt, max_tokens, prompt_cache=cache))) == 2


@pytest.mark.parametrize("tokens", [20, 21])
def test_a_prompt_that_fills_the_context_is_refused(tokens: int) -> None:
    model = HashModel()
    model.max_context = 20  # type: ignore[attr-defined]
    for answer in (stream_generate(model, TOKENIZER, [1] * tokens), generate_step(mx.ones(tokens), model)):
        with pytest.raises(RequestError, match=f"prompt of {tokens} tokens .* context of 20 tokens; shorten"):
            next(answer)
    assert model.calls == []
