"""The tokenizer, its chat template, and decoding a token at a time."""

import json
from pathlib import Path

import pytest
import tokenizers
from fakes import make_checkpoint, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flashmoe.chat_template import ChatTemplate
from mlx_flashmoe.errors import FormatError, RequestError
from mlx_flashmoe.tokenizer import ByteLevelDetokenizer, Tokenizer, WindowDetokenizer

TOKENIZER = tokenizer()
USER = [{"role": "user", "content": "Hi"}]


def stream(tok: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tok.detokenizer
    return [*(detokenizer.add_token(i) for i in ids), detokenizer.finalize()]


# Decoding a token at a time


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 720), max_size=60))
def test_pieces_joined_are_the_text_of_any_tokens(ids: list[int]) -> None:
    """Also of bytes that are not UTF-8, of special tokens and of ids beyond the vocabulary."""
    pieces = stream(TOKENIZER, ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_valid_text_never_comes_in_half_characters(text: str) -> None:
    pieces = stream(TOKENIZER, TOKENIZER.encode(text))
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)
    special = make_checkpoint.SPECIAL
    if not any(s in text for s in special):
        assert "".join(pieces) == text


def test_each_token_is_shown_as_soon_as_its_characters_are_whole() -> None:
    ids = TOKENIZER.encode("a🚢b")
    ship = ids[1:-1]
    assert len(ship) > 1
    assert stream(TOKENIZER, ids) == ["a", *[""] * (len(ship) - 1), "🚢", "b", ""]
    assert stream(TOKENIZER, ids[:2]) == ["a", "", "\ufffd"]


def test_end_tokens_are_hidden_and_thinking_marks_are_not() -> None:
    text = "<think>\nhm\n</think>\n\nyes<|im_end|><|endoftext|>"
    assert "".join(stream(TOKENIZER, TOKENIZER.encode(text))) == "<think>\nhm\n</think>\n\nyes"


def test_decoding_keeps_no_history() -> None:
    """Amortized constant work a token: what is decoded again never grows."""
    window: list[int] = []
    decoder = WindowDetokenizer(lambda ids: window.append(len(ids)) or "x" * len(ids))
    for i in range(1000):
        assert decoder.add_token(i) == "x"
    assert max(window) == 2


def sentencepiece_like() -> Tokenizer:
    """Words with ▁ for a space and single bytes as <0x..>, as in SentencePiece vocabularies."""
    words = ["<unk>", "▁the", "▁boat", "▁", "s", "a", "▁ships"] + [f"<0x{b:02X}>" for b in range(256)]
    model = tokenizers.models.BPE(
        {w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"
    )
    made = tokenizers.Tokenizer(model)
    d = tokenizers.decoders
    made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return Tokenizer(made)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 6).map(lambda i: [i]), st.just("🚢é"), st.just("ü")), max_size=40))
def test_other_vocabularies_stream_too(parts: list) -> None:
    tok = sentencepiece_like()
    ids: list[int] = []
    for part in parts:
        ids += part if isinstance(part, list) else [7 + b for b in part.encode()]
    pieces = stream(tok, ids)
    assert "".join(pieces) == tok.decode(ids)
    assert not any("\ufffd" in p for p in pieces)


def test_the_byte_level_decoder_is_the_one_in_use() -> None:
    assert isinstance(TOKENIZER.detokenizer, ByteLevelDetokenizer)
    assert isinstance(sentencepiece_like().detokenizer, WindowDetokenizer)
    assert TOKENIZER.detokenizer is not TOKENIZER.detokenizer


# Encoding


def test_encode_and_decode_are_inverse() -> None:
    text = "Où est la gare? 你好 🚢\n\n  def f(x):\treturn x"
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_unpaired_surrogates_are_a_clear_error() -> None:
    with pytest.raises(RequestError, match="surrogates"):
        TOKENIZER.encode("bad \udcff")


def test_decode_shows_special_tokens_unless_told() -> None:
    ids = TOKENIZER.encode("yes<|im_end|>")
    assert TOKENIZER.decode(ids) == "yes<|im_end|>"
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "yes"


# Loading


def write(folder: Path, **files: object) -> Path:
    make_checkpoint.build_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_end_tokens_are_the_union_of_what_the_files_name(tmp_path: Path) -> None:
    im_end, endoftext = TOKENIZER.token_id("<|im_end|>"), TOKENIZER.token_id("<|endoftext|>")
    folder = write(
        tmp_path,
        generation_config={"eos_token_id": [3, 4]},
        config={"eos_token_id": 5, "text_config": {"eos_token_id": endoftext}},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": None},
    )
    tok = Tokenizer.load(folder)
    assert tok.eos_token_ids == {3, 4, 5, im_end, endoftext}
    assert tok.eos_token == "<|im_end|>" and tok.bos_token is None and tok.bos_token_id is None


def test_only_tokenizer_json_is_needed(tmp_path: Path) -> None:
    tok = Tokenizer.load(write(tmp_path))
    assert tok.eos_token_ids == set() and not tok.has_chat_template
    assert tok.vocab_size == make_checkpoint.build_tokenizer().get_vocab_size()


@pytest.mark.parametrize("name", ["generation_config", "config", "tokenizer_config"])
def test_malformed_files_are_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path)
    for text in (
        "{",
        "[]",
        '{"eos_token_id": "x"}' if name != "tokenizer_config" else '{"chat_template": [1]}',
    ):
        (folder / f"{name}.json").write_text(text)
        with pytest.raises(FormatError, match=f"{name}.json"):
            Tokenizer.load(folder)


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)


# Chat templates


def chat(template: str | dict[str, str], **kwargs: object) -> str:
    templates = {"default": template} if isinstance(template, str) else template
    tok = Tokenizer(TOKENIZER._tokenizer, special_tokens={"bos_token": "<s>"}, chat_templates=templates)
    return tok.apply_chat_template(**{"messages": USER, "tokenize": False, **kwargs})


def test_the_rendered_text_is_tokenized_as_it_is() -> None:
    text = TOKENIZER.apply_chat_template(USER, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    ids = TOKENIZER.apply_chat_template(USER)
    assert ids == TOKENIZER.encode(text, add_special_tokens=False)
    assert ids.count(TOKENIZER.token_id("<|im_start|>")) == 2
    assert TOKENIZER.apply_chat_template(USER, add_generation_prompt=False, tokenize=False).endswith(
        "<|im_end|>\n"
    )
    off = TOKENIZER.apply_chat_template(USER, tokenize=False, enable_thinking=False)
    assert off.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s>"),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),  # trim_blocks and lstrip_blocks
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% continue %}{% endif %}{{ m }}{% endfor %}", "13"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}a{{ 1 + 1 }}{% endgeneration %}b", "a2b"),
        ("{{ {'b': '<é>', 'a': [1, none]} | tojson }}", '{"b": "<é>", "a": [1, null]}'),
        ("{{ {'b': 1} | tojson(indent=2) }}", '{\n  "b": 1\n}'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ dict(a=1).a }}", "1"),
        ("{% if documents is none and tools is none %}x{% endif %}", "x"),
        ("{{ messages[0].content.split('i')[0] }}", "H"),
    ],
)
def test_templates_have_what_they_are_written_for(template: str, expected: str) -> None:
    assert chat(template) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('No user query.') }}", "No user query."),
        ("{{ 1 + messages }}", "unsupported operand"),
        ("{{ nothing.at.all }}", "nothing"),
        ("{% if %}", "not valid Jinja"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__ }}{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "__init__"),
        ("{% set ns = namespace(__init__=1) %}", "__init__"),
    ],
)
def test_what_a_template_may_not_do_or_refuses_is_one_clear_error(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=r"the (checkpoint's )?chat template") as e:
        chat(template)
    assert message in str(e.value)


def test_templates_see_plain_data_only() -> None:
    with pytest.raises(RequestError, match="not JSON serializable"):
        chat("{{ thing }}", thing=object())


def test_no_template_is_a_clear_error() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        chat({})
    with pytest.raises(RequestError, match="only tool_use"):
        chat({"tool_use": "x"})


def test_named_templates() -> None:
    both = {"default": "plain", "tool_use": "{{ tools | length }} tools"}
    assert chat(both) == "plain"
    assert chat(both, tools=[{"name": "f"}]) == "1 tools"
    assert chat({"default": "only"}, tools=[{"name": "f"}]) == "only"


def test_where_templates_are_found(tmp_path: Path) -> None:
    def render() -> str:
        return Tokenizer.load(tmp_path).apply_chat_template(USER, tokenize=False)

    write(tmp_path, tokenizer_config={"chat_template": "from the settings"})
    assert render() == "from the settings"
    write(tmp_path, tokenizer_config={"chat_template": [{"name": "default", "template": "from a list"}]})
    assert render() == "from a list"
    (tmp_path / "chat_template.jinja").write_text("from é file", encoding="utf-8")
    assert render() == "from é file"


# Thinking


def test_whether_a_prompt_opens_thinking() -> None:
    assert TOKENIZER.has_thinking
    opens = TOKENIZER.opens_thinking
    assert opens(TOKENIZER.apply_chat_template(USER))
    assert not opens(TOKENIZER.apply_chat_template(USER, enable_thinking=False))
    # What a user writes about thinking opens none.
    said = [{"role": "user", "content": "what is <think>?"}]
    assert not opens(TOKENIZER.apply_chat_template(said, add_generation_prompt=False))
    assert not opens(TOKENIZER.encode("plain"))
    assert not sentencepiece_like().has_thinking


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("{% if enable_thinking is defined and not enable_thinking %}x{% endif %}", True),
        ("{{ messages[0].content }}{% if tools %}{{ enable_thinking }}{% endif %}", True),
        ("{{ messages[0].content }} enable_thinking", False),
        ("{% set enable_thinking = true %}{{ enable_thinking }}", False),
        ("{{ messages[0].enable_thinking }}", False),
    ],
)
def test_a_template_is_known_to_read_a_variable(source: str, reads: bool) -> None:
    assert ChatTemplate(source, {}).reads("enable_thinking") is reads


# Calls in the history

CALLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_1", "function": {"name": "look", "arguments": {"at": "Zürich"}}},
            {"id": "call_2", "function": {"name": "look", "arguments": {"at": "Bern"}}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_2", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "say", "arguments": {}}}]},
    {"role": "tool", "content": "said"},
]
CALL = "{% for c in m.tool_calls or [] %}[%s]{% endfor %}"
# As Kimi K2 has them: ids alone, and objects or texts.
BY_ID = "{{ c.id }}={{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
# As DeepSeek-V3.1 has them: a text, that is added to others.
ADDED = "{{ c.function.name + '=' + c.function.arguments }}"
# A template that would show Python's own form of an object.
SHOWN = "{{ c.function.name }}={{ c.function.arguments }}"
OBJECTS = "{{ c.function.name }}={{ c.function.arguments | tojson }}"
ENTRIES = "{{ c.function.name }}={% for k, v in c.function.arguments.items() %}{{ k }}:{{ v }}{% endfor %}"


@pytest.mark.parametrize(
    ("form", "first", "second", "last"),
    [
        (BY_ID, 'functions.look:0={"at": "Zürich"}', 'functions.look:1={"at": "Bern"}', "functions.say:2={}"),
        (ADDED, 'look={"at": "Zürich"}', 'look={"at": "Bern"}', "say={}"),
        (SHOWN, 'look={"at": "Zürich"}', 'look={"at": "Bern"}', "say={}"),
        (OBJECTS, 'look={"at": "Zürich"}', 'look={"at": "Bern"}', "say={}"),
        (ENTRIES, "look=at:Zürich", "look=at:Bern", "say="),
    ],
)
def test_calls_in_the_history_are_as_the_template_takes_them(
    form: str, first: str, second: str, last: str
) -> None:
    source = "{% for m in messages %}{{ m.role }}({{ m.content }}" + CALL.replace("%s", form)
    source += "{% if m.role == 'tool' %} of {{ m.tool_call_id }}{% endif %}){% endfor %}"
    tok = Tokenizer(TOKENIZER._tokenizer, chat_templates={"default": source})
    before = json.dumps(CALLS)
    text = tok.apply_chat_template(CALLS, tokenize=False)
    ids = (
        ("functions.look:1", "functions.look:0", "functions.say:2")
        if form == BY_ID
        else ("call_2", "call_1", "")
    )
    assert text == (
        f"user(Weather?)assistant([{first}][{second}])tool(rain of {ids[0]})tool(sun of {ids[1]})"
        f"assistant([{last}])tool(said of {ids[2]})"
    )
    assert json.dumps(CALLS) == before
