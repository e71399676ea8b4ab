"""Kept prompts: what goes on from one is what the whole prompt gives, and a wrong one is never used."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Spec, write_checkpoint
from fakes import FakeCache, HashModel, tokenizer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mlx_flashmoe import convert, load
from mlx_flashmoe.generate import generate_step, stream_generate
from mlx_flashmoe.loader import StreamingModel
from mlx_flashmoe.models.cache import KVCache
from mlx_flashmoe.prefix_cache import PrefixCache

START = 7  # begins a message in the token sequences made here
VOCABULARY = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("prefixes")
    write_checkpoint(base / "source", Spec(kv_heads=2, layers=4), "fused")
    (base / "source" / "tokenizer.json").unlink()
    convert(base / "source", base / "model", q_bits=4, q_group_size=32)
    return base / "model"


@pytest.fixture(scope="module", params=["auto", "os"])
def model(request: pytest.FixtureRequest, folder: Path) -> StreamingModel:
    """All experts in memory, where generating runs a step ahead; and read as needed."""
    return load(folder, request.param)[0]


def message(length: int, seed: int) -> list[int]:
    tokens = np.random.default_rng(seed).integers(8, VOCABULARY, length - 1)
    return [START, *tokens.tolist()]


FIRST = [*message(300, 1), *message(40, 2), START, 3, 4]  # instructions, a question, and the answer's opening


class Counting:
    """The model, with the lengths of its calls."""

    def __init__(self, model: StreamingModel):
        self._model, self.calls = model, []

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __call__(self, tokens: mx.array, cache: list) -> mx.array:
        self.calls.append(tokens.shape[1])
        return self._model(tokens, cache)

    def read(self, tokens: mx.array, cache: list) -> None:
        self.calls.append(tokens.shape[1])
        self._model.read(tokens, cache)


def answer(model, prompt: list[int], prefixes: PrefixCache | None, tokens: int = 8):
    """Tokens and log-probabilities."""
    steps = list(generate_step(mx.array(prompt), model, max_tokens=tokens, prefix_cache=prefixes))
    return [t for t, _ in steps], np.stack([np.array(logprobs) for _, logprobs in steps])


def second_turn(first_answer: list[int]) -> list[int]:
    """The next prompt: its template leaves out what stood at the beginning of the answer."""
    opening = FIRST.index(START, 301)
    return [*FIRST[:opening], START, 5, *first_answer[3:], *message(20, 3), START, 3, 4]


def test_the_second_turn_reads_what_is_new_and_gives_the_same_bits(
    model: StreamingModel, tmp_path: Path
) -> None:
    prefixes = PrefixCache(model.identity, START, directory=tmp_path / "kept")
    spoken, logprobs = answer(model, FIRST, prefixes)
    want, bits = answer(model, FIRST, None)
    assert spoken == want and np.array_equal(logprobs, bits)

    prompt = second_turn(spoken)
    want, bits = answer(model, prompt, None)
    shutil.copytree(tmp_path / "kept", tmp_path / "copy")
    after_a_restart = PrefixCache(model.identity, START, directory=tmp_path / "copy")
    for kept in (prefixes, after_a_restart):
        counting = Counting(model)
        got, logprobs = answer(counting, prompt, kept)
        assert got == want and np.array_equal(logprobs, bits)
        assert kept.restored == 340
        assert counting.calls[:4] == [len(prompt) - 343, 2, 1, 1]
    # Other conversations begin with the same first message.
    answer(model, [*FIRST[:300], *message(9, 5), START, 3, 4], after_a_restart, 1)
    assert after_a_restart.restored == 300


def test_an_answer_is_kept_to_its_last_token(model: StreamingModel) -> None:
    for stop_early in (False, True):
        prefixes = PrefixCache(model.identity, START)
        steps = generate_step(mx.array(FIRST), model, max_tokens=9, prefix_cache=prefixes)
        spoken = [next(steps)[0] for _ in range(5)] if stop_early else [t for t, _ in steps]
        steps.close()
        prompt = [*FIRST, *spoken, *message(10, 4)]
        got = answer(model, prompt, prefixes)
        want = answer(model, prompt, None)
        assert got[0] == want[0] and np.array_equal(got[1], want[1])
        # The last token has not been through the model, unless the step after it was under way.
        assert prefixes.restored == len(FIRST) + len(spoken) - (0 if model.resident and stop_early else 1)


def test_another_model_finds_nothing(model: StreamingModel, folder: Path, tmp_path: Path) -> None:
    prefixes = PrefixCache(model.identity, START, directory=tmp_path)
    answer(model, FIRST, prefixes, 1)
    fewer = load(folder, active_experts=1)[0]
    assert fewer.identity != model.identity == load(folder)[0].identity
    others = PrefixCache(fewer.identity, START, directory=tmp_path)
    answer(fewer, FIRST, others, 1)
    assert others.restored == 0


def test_the_identity_is_of_everything_that_changes_bits(folder: Path, tmp_path: Path) -> None:
    def identity(**options) -> str:
        return load(tmp_path / "copy", **options)[0].identity

    shutil.copytree(folder, tmp_path / "copy")
    one = identity()
    assert identity(expert_memory="os") == one  # which never changes a bit
    changed = {identity(dtype=mx.bfloat16), identity(active_experts=1)}
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    changed.add(identity())
    manifest = json.loads((tmp_path / "copy" / "flashmoe.json").read_text())
    manifest["source"] = {"path": "elsewhere", "revision": "1"}
    (tmp_path / "copy" / "flashmoe.json").write_text(json.dumps(manifest))
    changed.add(identity())
    manifest["layers"][1]["crc32"][2] ^= 1
    (tmp_path / "copy" / "flashmoe.json").write_text(json.dumps(manifest))
    changed.add(identity())
    assert len(changed | {one}) == 5


def test_logits_processors_see_the_whole_prompt() -> None:
    prefixes = PrefixCache("ab" * 32)
    ids = list(range(10, 40))
    for _ in range(2):
        seen = []

        def look(tokens: mx.array, logits: mx.array, seen: list = seen) -> mx.array:
            seen.append(tokens.tolist())
            return logits

        steps = generate_step(
            mx.array(ids), HashModel(), max_tokens=2, logits_processors=[look], prefix_cache=prefixes
        )
        tokens = [t for t, _ in steps]
        assert seen == [ids, [*ids, tokens[0]]]
    assert prefixes.restored == 29


def test_figures_count_what_was_kept() -> None:
    text = tokenizer()
    prefixes = PrefixCache("ab" * 32, text.message_start_id)
    conversation = [{"role": "user", "content": "How far is the moon?"}]
    for expected in (0, len(text.apply_chat_template(conversation, add_generation_prompt=False))):
        prompt = text.apply_chat_template(conversation)
        responses = stream_generate(HashModel(), text, prompt, max_tokens=2, prefix_cache=prefixes)
        assert [r.cached_tokens for r in responses] == [expected] * 2
        conversation += [{"role": "assistant", "content": "Far."}, {"role": "user", "content": "How far?"}]


def test_one_generation_has_one_cache() -> None:
    model = HashModel()
    with pytest.raises(ValueError, match="together"):
        next(
            generate_step(
                mx.array([1]), model, prompt_cache=model.make_cache(), prefix_cache=PrefixCache("ab" * 32)
            )
        )


# Where prompts are cut


def test_cuts() -> None:
    prefixes = PrefixCache("ab" * 32, START)
    long, short = message(300, 1), message(20, 2)
    opening = [START, 3]
    assert prefixes.cuts([*long, *short, *opening], 0) == [300, 320]
    assert prefixes.cuts([*long, *short, *opening], 300) == [320]
    assert prefixes.cuts([*long, *short, *opening], 320) == []
    assert prefixes.cuts([*short, *long, *short, *opening], 0) == [340]
    assert prefixes.cuts([*short, *opening], 0) == [20]
    assert prefixes.cuts([1, 2, 3], 0) == [2]
    assert prefixes.cuts([1], 0) == []


def test_the_token_that_begins_a_message() -> None:
    assert tokenizer().message_start_id == tokenizer().token_id("<|im_start|>")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    plain = tokenizer()
    for source in (template, "{{ raise_exception('no') }}", "{{ messages[0].content }}"):
        plain.chat_templates = {"default": source}
        plain._compiled.clear()
        assert plain.message_start_id is None
    plain.chat_templates = {}
    assert plain.message_start_id is None


# Copies


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("tokens", [255, 256, 257])
def test_what_is_kept_does_not_change_and_has_no_room_to_spare(tokens: int, heads: int) -> None:
    def some(length: int) -> mx.array:
        return mx.random.normal((1, heads, length, 8))

    cache = KVCache()
    cache.update(some(tokens), some(tokens))
    kept = cache.snapshot()
    mx.eval(kept, cache.state)
    before = {name: np.array(a) for name, a in kept.items()}
    assert kept["keys"].shape == (1, heads, tokens, 8)
    other = KVCache()
    other.restore(kept, tokens)
    for growing in (cache, other):
        for _ in range(3):
            growing.update(some(1), some(1))
            mx.eval(growing.state)
    for name, a in kept.items():
        assert np.array_equal(np.array(a), before[name])
    assert other.offset == tokens + 3
    assert np.array_equal(np.array(other.keys[..., :tokens, :]), before["keys"])


# Bounds and damage


def fill(tokens: list[int]) -> list[FakeCache]:
    """A cache that says which tokens it is of."""
    cache = FakeCache()
    cache.value = mx.array([len(tokens), *tokens], mx.int32)
    cache.offset = len(tokens)
    return [cache]


def found(prefixes: PrefixCache, tokens: list[int]) -> int:
    """How much is restored; and that it is of exactly these tokens."""
    cache = [FakeCache()]
    n = prefixes.restore(tokens, cache)
    assert n == prefixes.restored == cache[0].offset
    if n:
        assert cache[0].value.tolist() == [n, *tokens[:n]]
    return n


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    prefixes = PrefixCache("ab" * 32, memory_bytes=100, directory=tmp_path, disk_bytes=2000)
    for first in range(5):
        prefixes.keep([first, 1, 2, 3, 4, 5, 6], fill([first, 1, 2, 3, 4, 5, 6]))
        assert found(prefixes, [0, 1, 2, 3, 4, 5, 6, 0]) == 7  # used every time
    assert prefixes.nbytes <= 100
    files = list(tmp_path.iterdir())
    assert 2 <= len(files) < 5 and sum(f.stat().st_size for f in files) <= 2000
    assert found(prefixes, [1, 1, 2, 3, 4, 5, 6, 0]) == 0
    assert found(prefixes, [4, 1, 2, 3, 4, 5, 6, 0]) == 7
    assert found(PrefixCache("ab" * 32, directory=tmp_path), [0, 1, 2, 3, 4, 5, 6, 0]) == 7


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_beginning_of_a_conversation_outlives_its_run_of_tool_calls(tmp_path: Path, where: str) -> None:
    """The next question begins with the one before, without what was thought and called since."""
    room = (
        {"memory_bytes": 1000, "disk_bytes": 0}
        if where == "memory"
        else {"memory_bytes": 0, "disk_bytes": 6000}
    )
    prefixes = PrefixCache("ab" * 32, directory=tmp_path, **room)
    prompt = [1, 2, 3, 4]  # instructions and a question
    for call in range(30):
        found(prefixes, [*prompt, 0])
        prefixes.keep(prompt, fill(prompt))
        prompt = [*prompt, 10 + call, 50]
    assert found(prefixes, [*prompt, 0]) == len(prompt) - 2
    assert found(prefixes, [1, 2, 3, 4, 9, 9]) == 4
    for other in range(90, 99):  # and leaves when others have come
        prefixes.keep([other] * 40, fill([other] * 40))
    assert found(prefixes, [1, 2, 3, 4, 9, 9]) == 0


def test_what_is_found_is_the_longest_and_shorter_than_the_prompt(tmp_path: Path) -> None:
    kept = [[1], [1, 2], [1, 2, 3], [1, 9], [1, 9, 3], [8, 2]]
    prefixes = PrefixCache("ab" * 32, directory=tmp_path)
    for tokens in kept:
        prefixes.keep(tokens, fill(tokens))
    for reader in (prefixes, PrefixCache("ab" * 32, directory=tmp_path)):
        lengths = [found(reader, p) for p in ([1, 2, 3], [1, 2, 3, 4], [1, 9, 3, 3, 3], [1], [2, 1], [])]
        assert lengths == [2, 3, 3, 0, 0, 0]
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_nothing_is_kept_where_there_is_no_room(tmp_path: Path) -> None:
    prefixes = PrefixCache("ab" * 32, memory_bytes=0, directory=tmp_path / "kept", disk_bytes=0)
    prefixes.keep([1, 2], fill([1, 2]))
    assert found(prefixes, [1, 2, 3]) == 0
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("damage", ["empty", "short", "long", "flipped", "other", "renamed"])
def test_a_damaged_or_foreign_file_is_removed(tmp_path: Path, damage: str) -> None:
    tokens = [1, 2, 3, 4]
    PrefixCache("ab" * 32, directory=tmp_path).keep(tokens, fill(tokens))
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    if damage == "other":  # the same tokens and a name like this model's, of a model that is another
        other = "ab" * 8 + "cd" * 24
        file.unlink()
        PrefixCache(other, directory=tmp_path).keep(tokens, fill([9, 9, 9, 9]))
        (file,) = tmp_path.iterdir()
    elif damage == "renamed":
        file.unlink()
        PrefixCache("ab" * 32, directory=tmp_path).keep([4, 3, 2, 1], fill([4, 3, 2, 1]))
        (wrong,) = tmp_path.iterdir()
        file = file.with_name(file.name[:-20] + wrong.name[-20:])
        wrong.rename(file)
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        file.write_bytes(
            {"empty": b"", "short": data[:-3], "long": data + b"\0", "flipped": bytes(flipped)}[damage]
        )
    assert found(PrefixCache("ab" * 32, directory=tmp_path), [*tokens, 5]) == 0
    assert not file.exists()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    names = ["notes.txt", "model.safetensors", "part-1.safetensors"]
    for name in names:
        (tmp_path / name).write_text("mine")
    prefixes = PrefixCache("ab" * 32, directory=tmp_path, disk_bytes=1000)
    for first in range(4):
        prefixes.keep([first, 2], fill([first, 2]))
    assert {*names} <= {f.name for f in tmp_path.iterdir()}
    # But what a writer that was killed has left goes, when it is old.
    os.utime(tmp_path / "part-1.safetensors", (0, 0))
    PrefixCache("ab" * 32, directory=tmp_path)
    assert not (tmp_path / "part-1.safetensors").exists()


def test_without_a_usable_disk_it_goes_on_and_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notes: list[str] = []
    prefixes = PrefixCache("ab" * 32, directory=tmp_path / "file" / "kept", note=notes.append)
    for tokens in ([1, 2], [3, 4]):
        prefixes.keep(tokens, fill(tokens))
        assert found(prefixes, [*tokens, 9]) == 2
    assert len(notes) == 1 and "not kept on disk" in notes[0]


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    PrefixCache("ab" * 32, directory=tmp_path / "kept").keep([1, 2], fill([1, 2]))
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0


class Keeping(RuleBasedStateMachine):
    """Two models share a directory; states are kept, found, forgotten, damaged, and the program restarts."""

    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=4)

    @initialize(memory=st.sampled_from([0, 60, 10**6]), disk=st.sampled_from([0, 1500, 10**6]))
    def begin(self, memory: int, disk: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.room = SimpleNamespace(memory_bytes=memory, disk_bytes=disk)
        self.models = {name: self.start(name) for name in ("ab", "cd")}
        self.kept: set[tuple[str, tuple[int, ...]]] = set()
        self.restarted: set[str] = set()

    def teardown(self) -> None:
        self.folder.cleanup()

    def start(self, name: str) -> PrefixCache:
        return PrefixCache(name * 32, directory=self.folder.name, **vars(self.room))

    def state(self, name: str, tokens: list[int]) -> list[FakeCache]:
        cache = FakeCache()
        cache.value = mx.array([int(name, 16), len(tokens), *tokens], mx.int32)
        return [cache]

    @rule(name=st.sampled_from(["ab", "cd"]), tokens=tokens, on_disk=st.booleans())
    def keep(self, name: str, tokens: list[int], on_disk: bool) -> None:
        self.models[name].keep(tokens, self.state(name, tokens), on_disk)
        self.kept.add((name, tuple(tokens)))

    @rule(name=st.sampled_from(["ab", "cd"]), tokens=tokens)
    def find(self, name: str, tokens: list[int]) -> None:
        cache = [FakeCache()]
        n = self.models[name].restore(tokens, cache)
        assert n < len(tokens)
        if n:
            assert cache[0].value.tolist() == [int(name, 16), n, *tokens[:n]]
            assert (name, tuple(tokens[:n])) in self.kept
        if self.room.memory_bytes == 10**6 and name not in self.restarted:
            prefixes = [k for m, k in self.kept if m == name and k == tuple(tokens[: len(k)])]
            assert n == max((len(k) for k in prefixes if len(k) < len(tokens)), default=0)

    @rule(name=st.sampled_from(["ab", "cd"]))
    def restart(self, name: str) -> None:
        self.models[name] = self.start(name)
        self.restarted.add(name)

    @rule(seed=st.integers(0, 10**6))
    def damage(self, seed: int) -> None:
        choose = random.Random(seed)
        if files := sorted(Path(self.folder.name).iterdir()):
            file = choose.choice(files)
            data = bytearray(file.read_bytes())
            if data and choose.random() < 0.7:
                data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            file.write_bytes(data[: choose.randrange(len(data) + 1)] if choose.random() < 0.4 else data)

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "folder"):
            assert all(m.nbytes <= self.room.memory_bytes for m in self.models.values())
            assert sum(f.stat().st_size for f in Path(self.folder.name).iterdir()) <= self.room.disk_bytes


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
