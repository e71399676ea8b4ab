"""Kimi's tokenizers: the ranks of byte pairs in ``tiktoken.model``, where others have a ``tokenizer.json``.

The text is cut by a pattern that is part of Kimi's code, not of its files; then, in each piece, the two neighbours that
make the token of the lowest rank are joined, again and again. A line of the file is a token's bytes in base64, and its
rank, which is its id.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from mlx_flashmoe.errors import FormatError

NAME = "tiktoken.model"
# Beginnings of what tokenizer_config.json's auto_map names, where the pattern is the one below.
KIMI = ("tokenization_kimi.", "tokenization_moonshot.")
RESERVED = 256  # ids after the ranks: special tokens, with names in tokenizer_config.json or without

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORTENED}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORTENED}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def read(path: Path, settings: dict[str, Any], alphabet: dict[str, int]) -> Tokenizer:
    """The tokenizer of a checkpoint of Kimi's.

    Args:
        path: of its tiktoken.model.
        settings: its tokenizer_config.json.
        alphabet: the character that stands for each byte in a byte-level vocabulary -> the byte.

    Raises:
        FormatError: the file is malformed, or another model's.
    """
    code = settings.get("auto_map", {})
    named = str(code.get("AutoTokenizer", "")) if isinstance(code, dict) else ""
    if not any(start in named for start in KIMI):
        raise FormatError(
            f"{path}: how this model cuts text is in code that is not read; put the tokenizer.json of a repository "
            "that has one for this model into the folder"
        )
    ranks = _ranks(path)
    spelled = {byte: character for character, byte in alphabet.items()}
    vocabulary = {token: "".join(spelled[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], vocabulary[left], vocabulary[right]))
    merges.sort()
    tokenizer = Tokenizer(
        models.BPE(
            {vocabulary[token]: rank for token, rank in ranks.items()},
            [(left, right) for *_, left, right in merges],
            ignore_merges=True,
        )
    )
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = _special_tokens(path, settings, len(ranks))
    tokenizer.add_tokens(
        [AddedToken(name, special=special, normalized=False) for name, special in names.values()]
    )
    for i, (name, _) in names.items():
        if tokenizer.token_to_id(name) != i:
            raise FormatError(f"{path.parent / 'tokenizer_config.json'}: token {name!r} cannot have id {i}")
    return tokenizer


def _ranks(path: Path) -> dict[bytes, int]:
    """Token -> id, from 0 upwards without a gap, every single byte among them."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as e:
        raise FormatError(f"{path}: cannot be read: {e}") from None
    every_byte = all(bytes([byte]) in ranks for byte in range(256))
    if sorted(ranks.values()) != list(range(len(ranks))) or not every_byte:
        raise FormatError(f"{path}: not the ranks of every byte and of pairs, from 0 upwards")
    return ranks


def _special_tokens(path: Path, settings: dict[str, Any], first: int) -> dict[int, tuple[str, bool]]:
    """The tokens that text is not made of: id -> name, and whether it is hidden in answers."""
    names = {i: (f"<|reserved_token_{i}|>", True) for i in range(first, first + RESERVED)}
    added = settings.get("added_tokens_decoder", {})
    try:
        for i, token in added.items():
            names[int(i)] = (str(token["content"]), bool(token.get("special", False)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FormatError(
            f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder is malformed"
        ) from None
    return dict(sorted(names.items()))
