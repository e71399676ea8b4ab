"""lm-eval runs tasks to their end against the small trained model: multiple choice, perplexity, free answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients.harness import REPOSITORY, Served, python, python_version, run, seen, start

pytestmark = pytest.mark.clients

SMALL = REPOSITORY / "examples" / "small_moe"
QUESTIONS = 8

# As the model's chat template renders them, without thinking.
PROMPT = r"<|im_start|>user\n{{question}}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

TASKS = {
    "choice": rf"""
output_type: multiple_choice
doc_to_text: "{PROMPT}"
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
    "answer": rf"""
output_type: generate_until
doc_to_text: "{PROMPT}"
doc_to_target: answer
generation_kwargs: {{until: ["\n"], max_gen_toks: 50}}
metric_list: [{{metric: exact_match}}]
""",
    "chat": """
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 500}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("small")
    model, log = folder / "model", folder / "server.log"
    flashmoe = [sys.executable, "-m", "mlx_flashmoe"]
    convert = [*flashmoe, "convert", "--hf-path", str(SMALL / "model"), "--mlx-path", str(model)]
    subprocess.run(convert, check=True, capture_output=True, cwd=REPOSITORY)
    serve = [*flashmoe, "serve", "--model", str(model), "--port", "0", "--prefix-disk", "0"]
    yield from start(serve, folder, log)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with the tasks and their questions: tables with names and numbers, from the held-out set."""
    questions = []
    for line in (SMALL / "heldout.jsonl").read_text().splitlines():
        dialogue = json.loads(line)
        asked, answer = dialogue["messages"][0]["content"], dialogue["expected"]["content"]
        numbers = re.findall(r": \w+ (\d+)$", asked, re.MULTILINE)
        if dialogue["task"] != "table lookup" or len(set(numbers)) < 3:
            continue
        (right,) = [n for n in numbers if f" {n}." in answer]
        choices = [answer.replace(f" {right}.", f" {n}.") for n in numbers]
        questions.append(
            {"question": asked, "answer": answer, "choices": choices, "right": choices.index(answer)}
        )
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions[:QUESTIONS]))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        head = f"task: small_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{text}")
    return folder


def results(kind: str, arguments: str, tasks: Path, names: list[str], *options: str) -> dict[str, Any]:
    """What lm-eval says of tasks, by task."""
    out = tasks / f"{kind}.json"
    command = [python("lm_eval"), "-m", "lm_eval", "--model", kind, "--model_args", arguments]
    command += ["--include_path", str(tasks), "--tasks", ",".join(f"small_{n}" for n in names)]
    command += ["--output_path", str(out), *options]
    run(command, f"export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE={tasks}/cache")
    (written,) = tasks.glob(f"{kind}*.json")
    return json.loads(written.read_text())["results"]


def test_completions(small: Served, home: Path, tasks: Path) -> None:
    arguments = f"base_url={small.url}/v1/completions,model=any"
    said = results("local-completions", arguments, tasks, ["choice", "perplexity", "answer"])
    assert said["small_choice"]["acc,none"] == 1
    assert said["small_answer"]["exact_match,none"] == 1
    assert 1 < said["small_perplexity"]["word_perplexity,none"] < 10**9
    version = python_version("lm_eval", "lm_eval")
    seen("lm-eval", version, "local-completions: multiple choice, perplexity, answers")


def test_chat_completions(small: Served, home: Path, tasks: Path) -> None:
    arguments = f"base_url={small.url}/v1/chat/completions,model=any"
    said = results("local-chat-completions", arguments, tasks, ["chat"], "--apply_chat_template")
    assert said["small_chat"]["exact_match,none"] == 1
    seen("lm-eval", python_version("lm_eval", "lm_eval"), "local-chat-completions: answers")
