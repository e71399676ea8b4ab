"""The command line as a user meets it: real processes, exit statuses, both streams."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import make_checkpoint

from mlx_flashmoe import generate, load
from mlx_flashmoe.cli import main

COMMAND = [sys.executable, "-m", "mlx_flashmoe"]
ENV = {**os.environ, "MLX_DISABLE_COMPILE": "1", "COLUMNS": "80", "PYTHONWARNINGS": "error::ImportWarning"}
GREEDY = ["--prompt", "How far is the moon?", "--max-tokens", "12", "--show-thinking"]


def run(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, env=ENV, timeout=120
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint.write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    done = run("convert", "--hf-path", checkpoint, "--mlx-path", folder, "--q-bits", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder}: ") and done.stdout.count("\n") == 1
    assert re.search(r"^100% · 7\.\d+ MB of 7\.\d+ MB · ", done.stderr, re.M)
    return folder


@pytest.fixture(scope="module")
def endless(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without an end token and with a long context: its answers do not end by themselves."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(model, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (path := folder / name).is_file():
            text = path.read_text().replace('"eos_token', '"unused_eos_token')
            path.write_text(
                text.replace('"max_position_embeddings": 4096', '"max_position_embeddings": 1000000')
            )
    return folder


@pytest.fixture(scope="module")
def greedy_text(model: Path) -> str:
    """What a pipe gets: all of the answer is thinking, which the prompt has opened."""
    loaded, tokenizer = load(model)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "How far is the moon?"}])
    return "<think>\n" + generate(loaded, tokenizer, prompt, max_tokens=12).removesuffix("\n") + "\n"


# Help and errors


def test_help_names_what_there_is_and_nothing_else() -> None:
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: python -m mlx_flashmoe ")
    commands = re.findall(r"^    (\w+)  ", done.stdout, re.M)
    assert commands[:3] == ["convert", "verify", "generate"]
    for command in commands:
        page = run(command, "--help")
        assert page.returncode == 0
        assert page.stdout.startswith(f"usage: python -m mlx_flashmoe {command} ")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from mlx_flashmoe.cli import main\ntry: main(['generate', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'mlx', 'numpy', 'rich', 'tokenizers', 'huggingface_hub'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_and_the_installed_command() -> None:
    done = run("--version")
    assert done.returncode == 0 and re.fullmatch(r"mlx-flashmoe \d+\.\d+\.\d+\n", done.stdout)
    installed = Path(sys.executable).parent / "mlx_flashmoe"
    if not installed.exists():
        pytest.skip("the package is not installed in this environment")
    page = subprocess.run([installed, "--help"], capture_output=True, text=True, env=ENV, timeout=60)
    assert page.stdout.startswith("usage: mlx_flashmoe ")


GENERATE = ["generate", "--model", "nowhere", "--prompt", "hi"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*GENERATE, "--ignore-chat-template", "--system-prompt", "x"],
            "--system-prompt needs the chat template",
        ),
        ([*GENERATE, "--ignore-chat-template", "--no-think"], "--think needs the chat template"),
        (["chat", "--model", "nowhere", "--tools", "no.py"], "--tools no.py: there is no such file"),
        (GENERATE, "nowhere is not a converted model (no such folder; make one with: "),
        (["generate", "--model", "nowhere", "--prompt", " "], "the prompt is empty"),
        ([*GENERATE, "--top-p", "1.5"], "--top-p"),
        ([*GENERATE, "--temp", "nan"], "--temp"),
        ([*GENERATE, "--max-tokens", "0"], "--max-tokens"),
        ([*GENERATE, "--prefill-step-size", "0"], "--prefill-step-size"),
        ([*GENERATE, "--repetition-penalty", "-1"], "--repetition-penalty"),
        (["convert", "--hf-path", "./nowhere", "--mlx-path", "x"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENV, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["chat"],
        ["generate", "--prompt", "x"],
        [*GENERATE, "--max-tokens", "many"],
        [*GENERATE, "--max", "5"],  # no abbreviations: a later flag could take their meaning
        [*GENERATE, "--chat-template-config", "{"],
        [*GENERATE, "--chat-template-config", "[]"],
        [*GENERATE, "--chat-template-config", '{"tokenize": false}'],
        ["convert", "--hf-path", "a", "--mlx-path", "b", "--q-bits", "5"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("usage: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "command", "hint"),
    [
        ([*GENERATE, "--temperature", "1"], "generate", "--temperature 1; did you mean --temp?"),
        ([*GENERATE, "--max=5"], "generate", "--max=5; did you mean --max-tokens?"),
        (["chat", "--model", "x", "--tool", "t.py"], "chat", "--tool t.py; did you mean --tools?"),
        (["serve", "--model", "x", "--prot", "1"], "serve", "--prot 1; did you mean --port?"),
        (["bench", "kernels", "--second", "1"], "bench kernels", "--second 1; did you mean --seconds?"),
        ([*GENERATE, "hello", "-x"], "generate", "hello -x"),
        ([*GENERATE, "--zzzzzz"], "generate", "--zzzzzz"),
    ],
)
def test_an_unknown_option_gets_the_commands_usage_and_the_nearest_one(
    arguments: list[str], command: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments, prog="mlx_flashmoe")
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith(f"usage: mlx_flashmoe {command} ")
    assert err.endswith(f"error: unrecognized arguments: {hint}\n")


def test_a_number_of_experts_that_there_is_not_says_which_there_are(model: Path) -> None:
    for count in ("0", "-1", "1000"):
        done = run("generate", "--model", model, "--prompt", "hi", "--active-experts", count)
        assert done.returncode == 2
        assert re.search(rf"--active-experts {count}: .* has (\d+) experts; give 1 to \1\n$", done.stderr)


def test_a_damaged_model_is_one_line(model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(model, damaged)
    with open(damaged / "experts" / "layer_002.bin", "r+b") as f:
        f.truncate(100)
    done = run("generate", "--model", damaged, *GREEDY)
    assert done.returncode == 2 and done.stdout == ""
    assert "layer_002.bin" in done.stderr and done.stderr.count("\n") == 1


# Generating into a pipe


def test_a_pipe_gets_what_python_gets_and_figures_go_elsewhere(model: Path, greedy_text: str) -> None:
    done = run("generate", "--model", model, *GREEDY)
    assert done.returncode == 0
    assert done.stdout == greedy_text
    assert "sampling: the most likely token (generation_config.json" in done.stderr
    assert re.search(
        r"^prompt \d+ tokens at \S+ per second, answer 12 at \S+ · experts read .* · peak memory .*$",
        done.stderr,
        re.M,
    )
    assert "Traceback" not in done.stderr and "Loading" not in done.stderr


def test_an_answer_that_ends_within_its_thinking_says_what_to_do(model: Path) -> None:
    done = run("generate", "--model", model, "--prompt", "How far is the moon?", "--max-tokens", "1")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines()[-1] == (
        "the answer was cut off after 1 token (--max-tokens); it was still thinking: "
        "give more --max-tokens, or --no-think"
    )
    done = run(
        "generate", "--model", model, "--prompt", "How far is the moon?", "--max-tokens", "2", "--no-think"
    )
    assert done.stdout.strip() and done.stdout.endswith("\n")
    assert done.stderr.splitlines()[-1] == "the answer was cut off after 2 tokens (--max-tokens)"


@pytest.mark.parametrize("flag", [["--prompt", "-"], []])
def test_the_prompt_can_come_from_stdin(model: Path, greedy_text: str, flag: list[str]) -> None:
    arguments = ["--max-tokens", "12", "--show-thinking", *flag]
    done = run("generate", "--model", model, *arguments, stdin="How far is the moon?")
    assert done.stdout == greedy_text


def test_options_reach_the_model(model: Path, greedy_text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, where importing and compiling is done once."""

    def both(*options: str) -> tuple[str, str]:
        assert main(["generate", "--model", str(model), *GREEDY, *options]) == 0
        return capsys.readouterr()

    def text(*options: str) -> str:
        return both(*options)[0]

    assert "prompt 23 tokens" in both()[1]
    assert "prompt 39 tokens" in both("--system-prompt", "Be short.")[1]
    assert text("--prefill-step-size", "3", "--expert-memory", "os") == greedy_text
    sampled = text("--temp", "1.5", "--seed", "3")
    assert text("--temp", "1.5", "--seed", "3") == sampled != greedy_text
    assert text("--temp", "1.5", "--seed", "3", "--top-k", "1") == greedy_text
    assert text("--ignore-chat-template") != greedy_text
    assert text("--chat-template-config", json.dumps({"enable_thinking": False})) != greedy_text
    assert text("--active-experts", "1") != greedy_text


def test_without_a_template_the_prompt_is_continued(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "model"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    done = run("generate", "--model", bare, *GREEDY)
    assert done.returncode == 0 and "no chat template" in done.stderr
    assert done.stdout == run("generate", "--model", model, *GREEDY, "--ignore-chat-template").stdout


# Interrupted


def test_what_cuts_an_answer_off_is_said(model: Path) -> None:
    done = run("generate", "--model", model, *GREEDY)
    assert (
        "the answer was cut off after 12 tokens (--max-tokens); it was still" in done.stderr.splitlines()[-1]
    )
    long = run("generate", "--model", model, "--prompt", "-", "--ignore-chat-template", stdin="a b " * 4096)
    assert long.returncode == 2 and long.stdout == ""
    assert re.fullmatch(
        r"error: a prompt of \d{4,} tokens and an answer do not fit into the context of 4096 tokens; .*",
        long.stderr.splitlines()[-1],
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["generate", "chat", "verify"])
def test_a_full_disk_is_one_line(model: Path, command: str) -> None:
    arguments = [command, "--model", model]
    if command == "generate":
        arguments += GREEDY
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input="hi\n",
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=ENV,
            timeout=120,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: standard output cannot be written: No space left on device"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def shell(redirection: str, *arguments: str | Path, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, env=ENV, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_closed_streams(model: Path, greedy_text: str) -> None:
    assert shell("2>&-", "generate", "--model", model, *GREEDY) == (0, greedy_text.encode(), b"")
    closed = b"error: standard output is closed: there is nowhere to write the answer\n"
    assert shell(">&-", "generate", "--model", model, *GREEDY) == (2, b"", closed)
    assert shell(">&-", "chat", "--model", model) == (2, b"", closed)
    assert shell(">&-", "verify", "--model", model)[0] == 0
    status, _, error = shell("<&-", "generate", "--model", model, "--prompt", "-")
    assert (status, error) == (
        2,
        b"error: the prompt should come from standard input, which is closed; give --prompt TEXT\n",
    )


@pytest.mark.parametrize("locale", ["POSIX", "C.UTF-8"])
def test_a_prompt_that_is_not_text_is_refused_before_the_model_is_loaded(locale: str) -> None:
    command = ["env", f"LC_ALL={locale}", *COMMAND, "generate", "--model", "nowhere", "--prompt", "-"]
    done = subprocess.run(command, input=b"caf\xe9 au lait", capture_output=True, env=ENV, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: standard input is not UTF-8: ") and done.stderr.count(b"\n") == 1


def start(model: Path, **streams) -> subprocess.Popen[bytes]:
    options = ["--temp", "5", "--seed", "1", "--max-tokens", "100000", "--show-thinking"]
    return subprocess.Popen(
        [*COMMAND, "generate", "--model", model, "--prompt", "hi", *options], env=ENV, **streams
    )


def test_ctrl_c_ends_cleanly_with_what_there_is(endless: Path) -> None:
    process = start(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first + rest) >= 20
    assert b"Traceback" not in err and b"per second, answer" in err.splitlines()[-1]


def test_a_reader_that_goes_away_ends_it_quietly(endless: Path) -> None:
    process = start(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(20)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in err and b"Exception" not in err


def test_on_a_terminal_the_answer_is_drawn(endless: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(endless, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    out = b""
    interrupted = False
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not data:
            break
        out += data
        if len(out) > 3000 and not interrupted:
            process.send_signal(signal.SIGINT)
            interrupted = True
    assert process.wait(timeout=60) == 130
    os.close(ours)
    text = out.decode(errors="replace")
    assert "Thinking" in text and "Traceback" not in text
    last = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split())
    assert re.search(r"prompt \d+ tokens at \S+ per second, answer \d+ at .* peak memory \S+ MB$", last)
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is back


# The package


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import mlx_flashmoe.convert, mlx_flashmoe.generate",
        "import mlx_flashmoe.generate; import mlx_flashmoe; mlx_flashmoe.generate",
        "from mlx_flashmoe.convert import repack; from mlx_flashmoe.generate import generate_step",
        "import mlx_flashmoe.cli, mlx_flashmoe.console, mlx_flashmoe.loader",
        "from mlx_flashmoe import generate, convert; import mlx_flashmoe.convert, mlx_flashmoe.generate",
        "from mlx_flashmoe import *",
    ],
)
def test_the_package_gives_functions_in_any_import_order(before: str) -> None:
    code = f"""
import sys, types
{before}
import mlx_flashmoe
from mlx_flashmoe import convert, load, generate, stream_generate
assert [f.__name__ for f in (convert, load, generate, stream_generate)] == sorted(
    mlx_flashmoe.__all__, key=["convert", "load", "generate", "stream_generate"].index)
for name in mlx_flashmoe.__all__:
    assert isinstance(getattr(mlx_flashmoe, name), types.FunctionType), name
    assert name in dir(mlx_flashmoe)
assert isinstance(sys.modules["mlx_flashmoe.generate"], types.ModuleType)
from mlx_flashmoe.generate import GenerationResponse
from mlx_flashmoe.convert import convert as again
assert again is convert
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_importing_the_package_is_quick_and_unknown_names_are_errors() -> None:
    code = "import sys, mlx_flashmoe; print('mlx.core' in sys.modules, hasattr(mlx_flashmoe, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=60)
    assert done.stdout == "False False\n"
