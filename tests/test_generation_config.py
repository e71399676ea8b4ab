"""How a model is sampled: its generation_config.json, the command line above it, a request above both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_flashmoe.cli import _parser, _sampling
from mlx_flashmoe.errors import FormatError, RequestError
from mlx_flashmoe.generation_config import describe, suggested_sampling

QWEN = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
QWEN_SAMPLING = {"temp": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.mark.parametrize(
    ("config", "sampling", "line"),
    [
        (None, {}, "the most likely token (generation_config.json says nothing)"),
        ({}, {}, "the most likely token (generation_config.json says nothing)"),
        ({"eos_token_id": 5}, {}, "the most likely token (generation_config.json says nothing)"),
        (QWEN, QWEN_SAMPLING, "temperature 0.6, top-p 0.95, top-k 20 (generation_config.json)"),
        ({**QWEN, "top_k": 20.0, "min_p": None}, QWEN_SAMPLING, "temperature 0.6, top-p 0.95, top-k 20"),
        ({**QWEN, "do_sample": False}, {**QWEN_SAMPLING, "temp": 0}, "the most likely token"),
        ({"do_sample": False}, {"temp": 0}, "the most likely token (generation_config.json)"),
        ({"do_sample": True}, {"temp": 1}, "temperature 1 (generation_config.json)"),
        ({"temperature": 0.7}, {"temp": 0.7}, "temperature 0.7 (generation_config.json)"),
        ({"min_p": 0.1}, {"temp": 1, "min_p": 0.1}, "temperature 1, min-p 0.1"),
        ({"temperature": 0, "do_sample": True}, {"temp": 0}, "the most likely token"),
        (
            {"repetition_penalty": 1.05},
            {"repetition_penalty": 1.05},
            "the most likely token, repetition penalty 1.05 (generation_config.json)",
        ),
        (
            {**QWEN, "repetition_penalty": 1.05},
            {**QWEN_SAMPLING, "repetition_penalty": 1.05},
            "temperature 0.6, top-p 0.95, top-k 20, repetition penalty 1.05",
        ),
    ],
)
def test_the_file_counts_for_every_command(
    tmp_path: Path, config: Any, sampling: dict[str, Any], line: str
) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert suggested_sampling(tmp_path) == sampling
    for command in (["generate", "--prompt", "x"], ["chat"], ["serve"]):
        arguments = _parser("x").parse_args([*command, "--model", str(tmp_path)])
        used, said = _sampling(arguments)
        assert used == sampling
        assert said.startswith(f"sampling: {line}")


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"], ["serve"]])
def test_the_command_line_comes_before_the_file(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({**QWEN, "do_sample": False}))

    def sampled(*flags: str) -> tuple[dict[str, Any], str]:
        return _sampling(_parser("x").parse_args([*command, "--model", str(tmp_path), *flags]))

    used, said = sampled("--temp", "0.2", "--top-k", "0", "--presence-penalty", "1.5")
    assert used == {"temp": 0.2, "top_p": 0.95, "top_k": 0, "presence_penalty": 1.5}
    assert said == (
        "sampling: temperature 0.2, top-p 0.95, presence penalty 1.5 "
        "(generation_config.json; --temp 0.2; --top-k 0; --presence-penalty 1.5)"
    )
    with pytest.raises(RequestError, match="--temp"):
        sampled("--temp", "-1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "should be a JSON object"),
        ("{", "cannot be read"),
        ('{"temperature": "warm"}', 'temperature should be a number, but is "warm"'),
        ('{"top_p": 3}', "top_p .* but is 3"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(FormatError, match=f"generation_config.json: .*{message}"):
        suggested_sampling(tmp_path)


def test_an_option_that_was_not_given_is_not_named() -> None:
    assert (
        describe({}, {"temp": None})
        == "sampling: the most likely token (generation_config.json says nothing)"
    )
