"""Text to token ids and back: a checkpoint's ``tokenizer.json`` and its chat template.

The tokenizer itself is the ``tokenizers`` package's. Added here: which tokens end an answer, conversations as tokens
(only the chat template writes special ones), and decoding a token at a time.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import tokenizers

from mlx_flashmoe import tiktoken_model
from mlx_flashmoe.chat_template import ChatTemplate, Message, fit_calls
from mlx_flashmoe.errors import FormatError, RequestError

if TYPE_CHECKING:
    from mlx_flashmoe.tools.syntax import Syntax

THINK_START = "<think>"
THINK_END = "</think>"


class Tokenizer:
    """A checkpoint's tokenizer. Make one with :meth:`load`.

    Attributes:
        eos_token_ids: every token that ends an answer.
        special_tokens: by their names in tokenizer_config.json ("bos_token", "eos_token", "pad_token" …).
        chat_templates: template source by name; the usual one is called "default".
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eos_token_ids: Iterable[int] = (),
        special_tokens: dict[str, str] | None = None,
        chat_templates: dict[str, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.special_tokens = special_tokens or {}
        self.chat_templates = chat_templates or {}
        self._compiled: dict[str, ChatTemplate] = {}
        self._controls: dict[str, re.Pattern[str]] = {}  # by the template's source
        self._pieces: dict[int, bytes] = {}
        shown = self.tool_syntax.marks
        self._hidden = {
            i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special and t.content not in shown
        }
        self._byte_level = isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
        self.eos_token_ids: set[int] = set(eos_token_ids)
        if (eos := self.token_id(self.special_tokens.get("eos_token"))) is not None:
            self.eos_token_ids.add(eos)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Reads the tokenizer of a checkpoint or of a converted folder.

        The tokens that end an answer are the union of ``eos_token_id`` in generation_config.json and config.json
        and ``eos_token`` in tokenizer_config.json: published checkpoints name different ones in each.

        Raises:
            FormatError: tokenizer.json is missing, and so is Kimi's tiktoken.model; or one of the files is malformed.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        settings = _read_json(folder / "tokenizer_config.json")
        if not path.is_file() and (folder / tiktoken_model.NAME).is_file():
            tokenizer = tiktoken_model.read(folder / tiktoken_model.NAME, settings, _ALPHABET)
        elif not path.is_file():
            raise FormatError(
                f"{path} is missing: the folder has no tokenizer; put the model's tokenizer.json (or Kimi's "
                f"{tiktoken_model.NAME}) and tokenizer_config.json into it"
            )
        else:
            try:
                tokenizer = tokenizers.Tokenizer.from_file(str(path))
            except Exception as e:  # the package raises bare Exception
                raise FormatError(f"{path}: not a tokenizer: {e}") from None
        config = _read_json(folder / "config.json")
        text_config = config.get("text_config")
        eos_token_ids: set[int] = set()
        for name, holder in (
            ("generation_config.json", _read_json(folder / "generation_config.json")),
            ("config.json", config),
            ("config.json", text_config if isinstance(text_config, dict) else {}),
        ):
            eos_token_ids |= _token_ids(holder.get("eos_token_id"), folder / name)
        special_tokens = {}
        for key, value in settings.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                special_tokens[key] = content
        return cls(tokenizer, eos_token_ids, special_tokens, _chat_templates(folder, settings))

    # Tokens

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's own vocabulary may be padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self.bos_token)

    def token_id(self, token: str | None) -> int | None:
        """The id of a token's exact text, or None."""
        return None if token is None else self._tokenizer.token_to_id(token)

    @property
    def think_start_id(self) -> int | None:
        return self.token_id(THINK_START)

    @property
    def think_end_id(self) -> int | None:
        return self.token_id(THINK_END)

    @property
    def has_thinking(self) -> bool:
        """Whether the vocabulary sets thinking apart, between ``<think>`` and ``</think>``."""
        return self.think_start_id is not None and self.think_end_id is not None

    def opens_thinking(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to this prompt begins inside a thinking part that the prompt itself opened."""
        if not self.has_thinking:
            return False
        for token in reversed(prompt):
            if token == self.think_start_id:
                return True
            if token == self.think_end_id or token in self.eos_token_ids:
                return False
        return False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids.

        Args:
            add_special_tokens: also what the tokenizer puts around a text (often nothing, or one first token).

        Raises:
            RequestError: the text is not valid Unicode.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            if not isinstance(text, str):
                raise
            raise RequestError("the prompt is not valid Unicode text (it has unpaired surrogates)") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Token ids to text. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def detokenizer(self) -> Detokenizer:
        """A new decoder of one answer, a token at a time. Special tokens are left out."""
        if self._byte_level:
            return ByteLevelDetokenizer(self._piece)
        return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens=True))

    def _piece(self, token: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary; none for special and unknown tokens."""
        piece = self._pieces.get(token)
        if piece is None:
            text = None if token in self._hidden else self._tokenizer.id_to_token(token)
            piece = _byte_level_bytes(text or "")
            self._pieces[token] = piece
        return piece

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        if self._byte_level and token not in self._hidden:
            return self._piece(token)
        return (self._tokenizer.id_to_token(token) or "").encode()

    def byte_tokens(self) -> tuple[list[bytes], list[int]] | None:
        """The bytes of every token, in order, and the ids of the special ones; None if tokens are no plain bytes."""
        if not self._byte_level:
            return None
        added = self._tokenizer.get_added_tokens_decoder().items()
        return [self.token_bytes(i) for i in range(self.vocab_size)], [i for i, t in added if t.special]

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._tokenizer.to_str()

    # Chat

    @cached_property
    def tool_syntax(self) -> Syntax:
        """How the model writes tool calls, by what its chat template says of them."""
        from mlx_flashmoe.tools.syntaxes import syntax_of

        return syntax_of("\n".join(self.chat_templates.values()))

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = ...,
        add_generation_prompt: bool = ...,
        tokenize: Literal[True] = ...,
        continue_final_message: bool = ...,
        **kwargs: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = ...,
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[False],
        continue_final_message: bool = ...,
        **kwargs: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int] | str:
        """A conversation as the model was trained to see it.

        Args:
            messages: dicts with "role" and "content", in order.
            tools: JSON schemas of the functions the model may call.
            add_generation_prompt: end with the opening of the model's next message.
            tokenize: return token ids; otherwise the text.
            continue_final_message: end where the text of the last message ends, for the model to continue it.
            kwargs: further variables of the template, for example ``enable_thinking=False``.

        Only the template writes special tokens: text in the messages and tools that reads like one becomes
        ordinary tokens.

        Raises:
            RequestError: there is no template, or it refuses or fails on these messages.
        """
        template = self.chat_template(tools)
        # Characters that no text holds: one parts what would read as a special token, one ends the last message.
        guard, end = _unused_characters(
            json.dumps([messages, tools, kwargs], ensure_ascii=False, default=repr)
        )
        if continue_final_message:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + end}]
            add_generation_prompt = False
        control = self._control_tokens(template) if tokenize else None

        def guarded(text: str) -> str:
            return control.sub(lambda found: found[0][0] + guard + found[0][1:], text) if control else text

        messages = fit_calls(messages, template)
        text = template.render(messages, tools, add_generation_prompt, on_text=guarded, **kwargs)
        if continue_final_message:
            text = text[: text.rindex(end)]
        if not tokenize:
            return text
        return [t for piece in text.split(guard) for t in self.encode(piece, add_special_tokens=False)]

    def _control_tokens(self, template: ChatTemplate) -> re.Pattern[str]:
        """Matches the texts of special tokens, and of those others that the template writes."""
        if (known := self._controls.get(template.source)) is not None:
            return known
        texts = [
            token.content
            for token in self._tokenizer.get_added_tokens_decoder().values()
            if len(token.content.strip()) > 1
            and (
                token.special or token.content in template.source or token.content in (THINK_START, THINK_END)
            )
        ]
        pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
        self._controls[template.source] = pattern
        return pattern

    @property
    def message_start_id(self) -> int | None:
        """The special token that the chat template begins the model's message with; None if there is none such."""
        try:
            messages = [{"role": "user", "content": "?"}]
            asked = self.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
            opened = self.apply_chat_template(messages, tokenize=False)
        except RequestError:
            return None
        opening = self.encode(opened.removeprefix(asked), add_special_tokens=False)
        begins = opened.startswith(asked) and bool(opening) and opening[0] in self._hidden
        return opening[0] if begins else None

    def chat_template(self, tools: Any = None) -> ChatTemplate:
        """The template for a conversation with or without tools. Raises RequestError if there is none."""
        name = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            there = ", ".join(sorted(self.chat_templates))
            raise RequestError(
                "the checkpoint has no chat template; pass the prompt as it is (--ignore-chat-template)"
                if not there
                else f"the checkpoint has no chat template named {name!r}, only {there}"
            )
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.chat_templates[name], self.special_tokens)
        return self._compiled[name]


class Detokenizer:
    """Decodes one answer as its tokens come. The pieces joined are the text of all tokens decoded at once."""

    def add_token(self, token: int) -> str:
        """The text that is settled by one more token: whole characters only, often one word, sometimes ""."""
        raise NotImplementedError

    def finalize(self) -> str:
        """What was held back: an unfinished character, as U+FFFD."""
        raise NotImplementedError


class ByteLevelDetokenizer(Detokenizer):
    """For byte-level vocabularies, where every token is a run of bytes: an incremental UTF-8 decoder."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add_token(self, token: int) -> str:
        return self._decoder.decode(self._piece(token))

    def finalize(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer(Detokenizer):
    """For any other vocabulary: decodes the last tokens again with each new one, and shows what is added.

    The window begins with the tokens last shown, because many decoders treat the first token of a text apart.
    """

    # Tokens to wait for the rest of a character: its 4 bytes, and tokens before them that show nothing.
    PATIENCE = 8

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []
        self._new: list[int] = []

    def add_token(self, token: int) -> str:
        self._new.append(token)
        return self._show(self.PATIENCE)

    def finalize(self) -> str:
        return self._show(0)

    def _show(self, patience: int) -> str:
        before, text = self._decode(self._shown), self._decode(self._shown + self._new)
        if len(text) <= len(before) or (text.endswith("\ufffd") and len(self._new) < patience):
            return ""
        self._shown, self._new = self._new, []
        return text[len(before) :]


def _unused_characters(text: str) -> list[str]:
    """Two of Unicode's noncharacters that are for internal use, and that the text has not."""
    free = [
        c for c in map(chr, [*range(0xFDD0, 0xFDF0), *range(0x1FFFE, 0x110000, 0x10000)]) if c not in text
    ]
    if len(free) < 2:
        raise RequestError("the messages hold nearly all of Unicode's noncharacters: take some out")
    return free[:2]


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet: printable Latin-1 stands for itself, the rest is moved to
    U+0100 onwards, in order (the GPT-2 encoder's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(moved)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """A token's bytes. Added tokens are plain text and need not be spelled in the alphabet."""
    try:
        return bytes(_ALPHABET[c] for c in token)
    except KeyError:
        return token.encode("utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """An optional JSON file that holds an object; {} where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise FormatError(f"{path}: cannot be read: {e}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path}: a JSON object is expected, but it holds a {type(data).__name__}")
    return data


def _token_ids(value: Any, path: Path) -> set[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise FormatError(f"{path}: eos_token_id should be a token id or a list of them, but is {value!r}")
    return set(ids)


def _chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Template source by name. chat_template.jinja wins over the field of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    try:
        return {"default": path.read_text(encoding="utf-8")}
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as e:
        raise FormatError(f"{path}: cannot be read: {e}") from None
    field = settings.get("chat_template")
    if field is None:
        return {}
    if isinstance(field, str):
        return {"default": field}
    try:
        return {str(t["name"]): str(t["template"]) for t in field}
    except (TypeError, KeyError):
        raise FormatError(
            f"{folder / 'tokenizer_config.json'}: chat_template should be a string or a list of named templates"
        ) from None
