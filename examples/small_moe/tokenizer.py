"""The small model's tokenizer and chat format.

Byte-level BPE, trained on the corpus, that splits text as the Qwen3.5 family does (digits one by one) and has its
special tokens. The chat template beside this file renders dialogues; here it is run as any chat API would run it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ..make_checkpoint import PRETOKENIZE, SPECIAL, train_tokenizer
from .corpus import Dialogue, dialogue

VOCABULARY = 3072
# Marks are ordinary tokens of a vocabulary of their own: decoding shows them.
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
SAMPLE = 12_000  # dialogues that the merges are learned from
SAMPLE_SEED = 7


def build() -> Tokenizer:
    """The same tokenizer every time; a few seconds."""
    render = Renderer()
    texts = (render(dialogue(SAMPLE_SEED, i)) for i in range(SAMPLE))
    marks = SPECIAL + MARKS
    return train_tokenizer((_without(marks, text) for text in texts), VOCABULARY - len(marks), MARKS)


def _without(marks: tuple[str, ...], text: str) -> str:
    for mark in marks:
        text = text.replace(mark, "\n")
    return text


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "pretokenize_regex": PRETOKENIZE,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())


class Renderer:
    """Messages to text, by the chat template."""

    def __init__(self) -> None:
        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = refuse
        self.template = environment.from_string(TEMPLATE.read_text())

    def __call__(self, dialogue: Dialogue) -> str:
        """The whole dialogue, answers included."""
        return self.render(dialogue.messages, dialogue.tools)

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], **variables: Any) -> str:
        return self.template.render(messages=messages, tools=tools, **variables)
