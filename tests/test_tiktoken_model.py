"""Kimi's tokenizers: tiktoken.model gives what tiktoken computes with it."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Spec, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flashmoe import convert, load
from mlx_flashmoe.errors import FormatError
from mlx_flashmoe.tokenizer import Tokenizer

CORPUS = (
    "the thin thing that they then think of, there: 1234567 things! It's theirs; THEY'LL theorize.\n\n"
    "Zürich, Größe, naïveté. 北京的天气怎么样? 北京天气 Привет, мир aaaaaaaaa  aaaa   \t\n"
)
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "eos_token": "[EOS]",
    "bos_token": "[BOS]",
}


def trained(merges: int = 120) -> dict[bytes, int]:
    """Ranks: every byte, then the pairs that a text has most of."""
    ranks = {bytes([b]): b for b in range(256)}
    pieces = [bytes([b]) for b in CORPUS.encode()]
    while len(ranks) < 256 + merges:
        pair = Counter(pairwise(pieces)).most_common(1)[0][0]
        ranks.setdefault(b"".join(pair), len(ranks))
        pieces = joined(pieces, ranks, b"".join(pair))
    return ranks


def joined(pieces: list[bytes], ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    out: list[bytes] = []
    for piece in pieces:
        if out and out[-1] + piece == token:
            out[-1] = token
        else:
            out.append(piece)
    return out


RANKS = trained()


def tiktokens(piece: bytes) -> list[int]:
    """A piece's tokens: the whole one, or the leftmost pair of the lowest rank joined until there is none."""
    if piece in RANKS:
        return [RANKS[piece]]
    parts = [bytes([b]) for b in piece]
    while True:
        found = [(RANKS[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in RANKS]
        if not found:
            return [RANKS[part] for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def write(folder: Path, changes: dict[str, Any] | None = None, lines: list[bytes] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    if lines is None:
        lines = [base64.b64encode(token) + b" %d" % rank for token, rank in RANKS.items()]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    n = len(RANKS)
    added = {
        n: {"content": "[BOS]", "special": True},
        n + 1: {"content": "[EOS]", "special": True},
        n + 5: {"content": "<|tool_call_begin|>", "special": False},
    }
    said = {
        **SETTINGS,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        **(changes or {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": n + 3}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write(tmp_path_factory.mktemp("kimi")))


# As the pattern in the model's code cuts them: Han apart, numbers by three, capitals with what follows.
CUT: list[tuple[str, list[str]]] = [
    ("the thing", ["the", " thing"]),
    ("It's THEY'LL", ["It's", " THEY'LL"]),
    ("HTTPServer getHTTPServer", ["HTTPServer", " get", "HTTPServer"]),
    ("12345678", ["123", "456", "78"]),
    ("北京abc天气", ["北京", "abc", "天气"]),
    ("北京的 天气?", ["北京的", " ", "天气", "?"]),
    ("a  b", ["a", " ", " b"]),
    ("a \n\n b", ["a", " \n\n", " b"]),
    ("(x) -> y!\n", ["(x", ")", " ->", " y", "!\n"]),
    ("Größe мир", ["Größe", " мир"]),
]


@pytest.mark.parametrize(("text", "pieces"), CUT)
def test_text_is_cut_as_in_kimis_code(tokenizer: Tokenizer, text: str, pieces: list[str]) -> None:
    assert tokenizer.encode(text) == [i for piece in pieces for i in tiktokens(piece.encode())]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("thenigaAüößZ北京天气е"), max_size=24))
def test_a_word_is_joined_as_tiktoken_does(tokenizer: Tokenizer, text: str) -> None:
    cut = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text)
    pieces = [text[a:b] for _, (a, b) in cut]
    assert "".join(pieces) == text
    assert tokenizer.encode(text) == [i for piece in pieces for i in tiktokens(piece.encode())]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_their_ids(tokenizer: Tokenizer) -> None:
    n = len(RANKS)
    assert tokenizer.vocab_size == n + 256
    assert (tokenizer.token_id("[BOS]"), tokenizer.token_id("<|tool_call_begin|>")) == (n, n + 5)
    assert tokenizer.token_id(f"<|reserved_token_{n + 255}|>") == n + 255
    assert tokenizer.eos_token_ids == {n + 1, n + 3}
    assert tokenizer.encode("[BOS]the<|tool_call_begin|>") == [n, RANKS[b"the"], n + 5]
    assert tokenizer.decode([n, RANKS[b"the"], n + 5], skip_special_tokens=True) == "the<|tool_call_begin|>"


def test_a_conversion_keeps_it(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Spec())
    (source / "tokenizer.json").unlink()
    convert(write(source), tmp_path / "out")
    _, tokenizer = load(tmp_path / "out")
    assert tokenizer.encode("the thing") == Tokenizer.load(source).encode("the thing")


GOOD = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]


@pytest.mark.parametrize(
    ("changes", "lines", "error"),
    [
        (
            {"auto_map": {"AutoTokenizer": ["tokenization_other.Tokenizer", None]}},
            None,
            "put the tokenizer.json",
        ),
        ({"auto_map": "x"}, None, "put the tokenizer.json"),
        ({}, GOOD[:-1], "not the ranks of every byte"),
        ({}, [*GOOD, b"YWI= 300"], "not the ranks of every byte"),
        ({}, [*GOOD, b"YWI="], r"tiktoken\.model: cannot be read"),
        ({}, [*GOOD, b"*** 256"], r"tiktoken\.model: cannot be read"),
        ({"added_tokens_decoder": []}, None, "added_tokens_decoder is malformed"),
        ({"added_tokens_decoder": {"5": {"content": "[X]"}}}, None, r"token '\[X\]' cannot have id 5"),
    ],
)
def test_what_cannot_be_read_is_an_error(
    tmp_path: Path, changes: dict[str, Any], lines: list[bytes] | None, error: str
) -> None:
    with pytest.raises(FormatError, match=error):
        Tokenizer.load(write(tmp_path / "kimi", changes, lines))


def test_without_either_file_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"put the model's tokenizer\.json \(or Kimi's tiktoken\.model\)"):
        Tokenizer.load(tmp_path)
