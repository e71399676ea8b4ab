"""The command line: what the flags are called, and which command they go to.

Modules that take time to import are imported by the command that needs them, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_flashmoe import system
from mlx_flashmoe.errors import FlashMoEError, RequestError
from mlx_flashmoe.system import check_processor, keep_awake

if TYPE_CHECKING:
    from mlx_flashmoe.loader import StreamingModel
    from mlx_flashmoe.tokenizer import Tokenizer

INTERRUPTED = 130  # as shells report a command ended by Ctrl-C …
PIPE_CLOSED = 141  # … and one whose reader went away


def main(argv: Sequence[str] | None = None, prog: str = "mlx_flashmoe") -> int:
    """Runs a command and returns its exit status: 0, 1 if selftest has found a fault, 2 for an error of the user's,
    130 for Ctrl-C.

    Args:
        argv: the arguments, without the program's name; the process's own by default.
        prog: the program's name in help texts.
    """
    answers = sys.stdout is not None
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process runs
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Generated text may hold what the terminal's encoding has not.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments, unknown = _parser(prog).parse_known_args(argv)
    if unknown:
        arguments.parser.refuse(unknown)
    try:
        check_processor()
        if not answers and arguments.run in (_generate, _chat):
            raise RequestError("standard output is closed: there is nowhere to write the answer")
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except FlashMoEError as e:
        return _failed(str(e))
    except ModuleNotFoundError as e:
        if (e.name or "mlx_flashmoe").startswith("mlx_flashmoe"):
            raise
        return _failed(_missing(e.name or ""))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return PIPE_CLOSED
    except OSError as error:
        try:
            print(flush=True)  # is it stdout that cannot be written?
        except OSError as e:
            _discard_stdout()
            return _failed(f"standard output cannot be written: {e.strerror}")
        raise error


def _missing(module: str) -> str:
    """The line for a package that is not installed."""
    package = module.partition(".")[0]
    if package == "mlx" and system.LINUX:
        return "MLX is missing: pip install 'mlx-flashmoe[cpu]', or [cuda] for an NVIDIA GPU; in a clone '.[cpu]'"
    return f"the Python package {package} is missing: pip install {package}, or install mlx-flashmoe anew"


def _failed(message: str) -> int:
    from mlx_flashmoe.console import print_error

    with suppress(OSError):  # stderr may be as full as stdout
        print_error(message)
    return 2


def _discard_stdout() -> None:
    """Python flushes stdout once more at exit: it gets somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """A parser that the arguments remember: what one command does not know is an error with that command's usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_defaults(parser=self)

    def refuse(self, unknown: Sequence[str]) -> None:
        """Exits with the usage, and the nearest option that there is."""
        given = unknown[0].partition("=")[0]
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        near = [flag for flag in known if flag.startswith(given) or given.startswith(flag)]
        near += difflib.get_close_matches(given, known, n=1)
        hint = f"; did you mean {near[0]}?" if given.startswith("--") and near else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        description="Run Mixture-of-Experts models several times larger than memory: "
        "the experts stay on disk, and only those a token is routed to are read.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_convert(commands)
    _add_verify(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_eval(commands)
    _add_bench(commands)
    _add_doctor(commands)
    _add_models(commands)
    _add_selftest(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"mlx-flashmoe {version('mlx-flashmoe')}")
        parser.exit()


# convert


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        allow_abbrev=False,
        help="repack a checkpoint so that it can be streamed from disk",
        description="Repack a checkpoint into a folder that generate can stream from: the part every token "
        "needs, and one block on disk for every expert. The same command again resumes a conversion that was "
        "interrupted, and mends what verify has found damaged.",
    )
    parser.add_argument(
        "--hf-path",
        required=True,
        metavar="ID_OR_DIR",
        help="the checkpoint: a folder, or the name of a repository on the Hugging Face hub",
    )
    parser.add_argument("--mlx-path", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--q-bits",
        type=int,
        choices=(2, 3, 4, 6, 8, 16),
        help="bits per weight; 16 leaves all weights as published (default: as published if the checkpoint is "
        "quantized, else 4)",
    )
    parser.add_argument(
        "--q-group-size",
        type=int,
        choices=(32, 64, 128),
        help="weights that share a scale and a bias (default: the checkpoint's own if it is quantized, else 64)",
    )
    parser.add_argument(
        "--q-bits-gate-up",
        type=int,
        choices=(2, 3, 4, 6, 8, 16),
        help="bits of the experts' gate_proj and up_proj (default: as --q-bits)",
    )
    parser.add_argument(
        "--q-bits-down",
        type=int,
        choices=(2, 3, 4, 6, 8, 16),
        help="bits of the experts' down_proj (default: as --q-bits)",
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="a TOML file with the same choices, for single layers too (README.md shows one); options given here come "
        "before it, but not before its layers",
    )
    parser.add_argument(
        "--delete-source",
        action="store_true",
        help="remove each of the checkpoint's weight files once all of it is converted, flushed and read back; "
        "files that hold weights which are left out stay",
    )
    parser.set_defaults(run=_convert)


@keep_awake()
def _convert(arguments: argparse.Namespace) -> int:
    from mlx_flashmoe import convert
    from mlx_flashmoe.console import ConversionProgress, print_note
    from mlx_flashmoe.sizes import counted, show_size

    try:
        with ConversionProgress() as display:
            made = convert(
                arguments.hf_path,
                arguments.mlx_path,
                q_bits=arguments.q_bits,
                q_group_size=arguments.q_group_size,
                q_bits_gate_up=arguments.q_bits_gate_up,
                q_bits_down=arguments.q_bits_down,
                recipe=arguments.recipe,
                delete_source=arguments.delete_source,
                progress=display.progress,
                note=display.note,
            )
    except KeyboardInterrupt:
        print_note("stopped; the same command resumes")
        return INTERRUPTED
    print(
        f"{arguments.mlx_path}: {show_size(made.expert_bytes)} of experts in {counted(len(made.layers), 'layer')}, "
        f"{show_size(made.dense_bytes)} for everything else"
    )
    return 0


# verify


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        allow_abbrev=False,
        help="read a converted model again, and compare it with its checksums or its source",
        description="Read all of a converted model from the disk and compare it with the checksums that convert "
        "has kept, or with the checkpoint it was made from. Says what is damaged or missing, of config.json, the "
        "tokenizer's files and the chat template too, and the command that mends it.",
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="as of generate")
    parser.add_argument(
        "--against",
        metavar="ID_OR_DIR",
        help="compare every byte with what converting this checkpoint gives now; with --repair the checkpoint to mend "
        "from (default: the one that was converted)",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="compare checksums, and make what is damaged again: of the checkpoint only that is read or downloaded",
    )
    parser.set_defaults(run=_verify)


@keep_awake()
def _verify(arguments: argparse.Namespace) -> int:
    import time

    from mlx_flashmoe.console import ConversionProgress
    from mlx_flashmoe.convert import verify
    from mlx_flashmoe.sizes import show_size

    _fetch_model(arguments)
    started = time.perf_counter()
    with ConversionProgress() as display:
        compared = verify(
            arguments.model,
            arguments.against,
            repair=arguments.repair,
            progress=display.progress,
            note=display.note,
        )
    rate = compared / (time.perf_counter() - started)
    print(f"{arguments.model}: {show_size(compared)} as they should be, read at {show_size(rate)}/s")
    return 0


# generate


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        allow_abbrev=False,
        help="answer one prompt with a converted model",
        description="Answer one prompt with a converted model. On a terminal the answer is drawn as it comes; "
        "in a pipe it is plain text without the thinking, and the figures go to stderr.",
    )
    _add_model_flags(parser)
    parser.add_argument(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="the prompt; - reads it from standard input, as does nothing at all where that is not a terminal",
    )
    parser.add_argument("--system-prompt", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="continue the prompt as it is, instead of answering it as a message",
    )
    parser.add_argument(
        "--show-thinking", action="store_true", help="in a pipe, print the thinking too, between its tags"
    )
    _add_think_flags(parser)
    _add_generation_flags(parser, max_tokens=256)
    parser.set_defaults(run=_generate)


def _add_model_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--model",
        required=required,
        metavar="DIR_OR_ID",
        help="a folder that convert has written, or the name of a repository on the hub with such a folder's files",
    )
    parser.add_argument(
        "--expert-memory",
        default="auto",
        metavar="SIZE",
        help="memory that holds experts between tokens: a size such as 8GB; auto picks one and leaves to other "
        "programs what they use now; os takes little and leaves caching to the operating system (default: %(default)s)",
    )
    parser.add_argument(
        "--active-experts",
        type=int,
        metavar="N",
        help="experts per token and layer; fewer are faster and change the answer (default: the model's own)",
    )
    parser.add_argument(
        "--experts-path",
        action="append",
        default=[],
        metavar="DIR",
        help="another folder that holds copies of expert files (DIR/experts/layer_000.bin and so on), best on "
        "another disk: reads are spread over all copies. May be given more than once",
    )
    parser.add_argument(
        "--direct-reads",
        action="store_true",
        help="read experts around the operating system's page cache, so that it keeps none of them; --expert-memory "
        "auto does so by itself where that was measured to be faster: on Linux CPUs, if memory is short",
    )
    parser.add_argument(
        "--check-reads",
        action="store_true",
        help="compare the checksum of every expert as it is read: a damaged one is an error; reading "
        "from the page cache takes about twice as long, from disk hardly longer",
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "custom", "mlx"),
        default="auto",
        help="on a GPU: auto compares this program's kernels with MLX's operations before their first use, and does "
        "without those that are wrong; custom uses them unseen; mlx uses MLX's operations (default: %(default)s)",
    )


def _add_generation_flags(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=max_tokens,
        metavar="N",
        help="stop after N tokens; -1 goes on until the model ends its answer (default: %(default)s)",
    )
    _add_sampling_flags(parser)
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampling reproducible")
    parser.add_argument(
        "--prefill-step-size",
        type=int,
        metavar="N",
        help="prompt tokens to work on at a time; more are faster and take more memory (default: as many as the "
        "memory plan has room for)",
    )
    parser.add_argument(
        "--chat-template-config",
        type=_json_object,
        default={},
        metavar="JSON",
        help="variables for the chat template, for example '{\"enable_thinking\": false}'",
    )


def _add_think_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="let the model think before it answers, or not: enable_thinking of chat templates that have it "
        "(default: the template's own)",
    )


def _template_variables(arguments: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """Variables for the chat template that the flags ask for."""
    _note_think(arguments, tokenizer)
    return {**arguments.chat_template_config, **_think(arguments)}


def _think(arguments: argparse.Namespace) -> dict[str, Any]:
    return {} if arguments.think is None else {"enable_thinking": arguments.think}


def _note_think(arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Says so if the chat template does not look at what --think sets."""
    if arguments.think is None or not tokenizer.has_chat_template:
        return
    if not tokenizer.chat_template().reads("enable_thinking"):
        from mlx_flashmoe.console import print_note

        flag = "--think" if arguments.think else "--no-think"
        print_note(f"{flag} changes nothing: the model's chat template has no enable_thinking")


_SAMPLING_FLAGS: tuple[tuple[str, type, str, str], ...] = (
    ("temp", float, "T", "sampling temperature; 0 always takes the most likely token"),
    ("top-p", float, "P", "sample from the smallest set of tokens whose probabilities reach P; 1 for all"),
    ("min-p", float, "P", "leave out tokens less likely than P times the most likely one; 0 for none"),
    ("top-k", int, "K", "sample from the K most likely tokens; 0 for all"),
    ("repetition-penalty", float, "R", "make recent tokens less likely to come again; 1 changes nothing"),
    ("repetition-context-size", int, "N", "recent tokens are the last N of prompt and answer; -1 for all"),
    ("presence-penalty", float, "X", "lower the logit of each token that the answer has already by X"),
    ("frequency-penalty", float, "X", "lower the logit of a token by X per occurrence in the answer"),
)
# The values if neither the command line nor generation_config.json sets them.
_SAMPLING_DEFAULTS = {"repetition-context-size": "20", "presence-penalty": "0", "frequency-penalty": "0"}


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    for name, number, metavar, text in _SAMPLING_FLAGS:
        default = _SAMPLING_DEFAULTS.get(name, "the model's generation_config.json")
        parser.add_argument(f"--{name}", type=number, metavar=metavar, help=f"{text} (default: {default})")


def _sampling(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Arguments of ``picking``, from the command line or else the model's folder; and a line that says so.

    Raises:
        RequestError, FormatError: a value of the command line, or of the model's file, is out of range.
    """
    from pathlib import Path

    from mlx_flashmoe.generation_config import describe, suggested_sampling
    from mlx_flashmoe.sampling import picking

    options = {name: getattr(arguments, name.replace("-", "_")) for name, *_ in _SAMPLING_FLAGS}
    options = {name.replace("-", "_"): value for name, value in options.items() if value is not None}
    picking(**options)
    _fetch_model(arguments)
    suggested = suggested_sampling(Path(arguments.model))
    return {**suggested, **options}, describe(suggested, options)


def _generation_options(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What ``_add_generation_flags`` has asked of ``stream_generate``, and a line about the sampling.

    Raises:
        RequestError, FormatError: a value is out of range.
    """
    from mlx_flashmoe.generate import check_counts
    from mlx_flashmoe.sampling import picking

    check_counts(arguments.max_tokens, arguments.prefill_step_size)
    sampling, line = _sampling(arguments)
    sampler, processors = picking(**sampling, seed=arguments.seed)
    options = {
        "max_tokens": arguments.max_tokens,
        "sampler": sampler,
        "logits_processors": processors,
        "prefill_step_size": arguments.prefill_step_size,
    }
    return options, line


def _load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``_add_model_flags`` has asked of ``load``, besides the model."""
    return {
        "expert_memory": arguments.expert_memory,
        "active_experts": arguments.active_experts,
        "experts_path": arguments.experts_path,
        "direct_reads": arguments.direct_reads,
        "check_reads": arguments.check_reads,
        "kernels": arguments.kernels,
    }


def _fetch_model(arguments: argparse.Namespace) -> None:
    """Has --model name a folder: a converted repository on the hub is fetched into one."""
    from mlx_flashmoe.fetch import find, model_folder

    folder = find(arguments.model)
    if folder is None:
        from mlx_flashmoe.console import ConversionProgress

        with keep_awake(), ConversionProgress() as display:
            try:
                folder = model_folder(arguments.model, display.note, display.progress)
            except KeyboardInterrupt:
                display.note("interrupted; the same command resumes")
                raise
    arguments.model = str(folder)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    if taken := {"messages", "tools", "add_generation_prompt", "tokenize"} & value.keys():
        raise argparse.ArgumentTypeError(f"{min(taken)} cannot be set")
    return value


@keep_awake()
def _generate(arguments: argparse.Namespace) -> int:
    # What can be wrong with a request is found before a model is loaded for it.
    options, sampling = _generation_options(arguments)
    if arguments.ignore_chat_template:
        for flag, given in (("--system-prompt", arguments.system_prompt), ("--think", arguments.think)):
            if given is not None:
                raise RequestError(
                    f"{flag} needs the chat template: leave {flag} or --ignore-chat-template out"
                )
    prompt = _prompt(arguments)

    from mlx_flashmoe import load, stream_generate
    from mlx_flashmoe.console import print_note
    from mlx_flashmoe.generate import answer_room, cut_off
    from mlx_flashmoe.terminal.answer import answer_view
    from mlx_flashmoe.terminal.bars import loading_bar, prompt_bar
    from mlx_flashmoe.watch import MemoryWatch

    with closing(loading_bar()) as bar:
        model, tokenizer = load(
            arguments.model, **_load_options(arguments), announce=print_note, progress=bar
        )
    print_note(sampling)
    tokens = _prompt_tokens(arguments, tokenizer, prompt)
    model.reserve(len(tokens) + max(0, min(arguments.max_tokens, answer_room(model, len(tokens), -1))))

    before = model.stats()
    response = None
    status = 0
    # A text that is continued is no answer: nothing is taken out of it.
    verbatim = arguments.show_thinking or arguments.ignore_chat_template or not tokenizer.has_chat_template
    view = answer_view(tokenizer.opens_thinking(tokens), tokenizer.think_end_id, verbatim)
    progress = prompt_bar()
    try:
        with MemoryWatch(print_note):
            for response in stream_generate(
                model,
                tokenizer,
                tokens,
                **options,
                prompt_progress_callback=progress,
            ):
                view.feed(response.text, response.token)
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        progress.close()
        view.close()
    if response is not None:
        after = model.stats()
        view.show_figures(
            response,
            after.bytes_read - before.bytes_read,
            after.hits - before.hits,
            after.misses - before.misses,
        )
        if note := cut_off(response, arguments.max_tokens):
            thinking = "; it was still thinking: give more --max-tokens, or --no-think" * view.thinking
            print_note(note + thinking)
    return status


def _prompt(arguments: argparse.Namespace) -> str:
    """The prompt of generate. Raises RequestError: there is none."""
    if arguments.prompt is None and sys.stdin is not None and sys.stdin.isatty():
        raise RequestError("a prompt is missing; give --prompt TEXT, or - to read standard input")
    if arguments.prompt in (None, "-"):
        from mlx_flashmoe import stdin

        prompt = stdin.read_all()
    else:
        prompt = str(arguments.prompt)
    if not prompt.strip():
        raise RequestError("the prompt is empty")
    return prompt


def _prompt_tokens(arguments: argparse.Namespace, tokenizer: Tokenizer, prompt: str) -> list[int]:
    if arguments.ignore_chat_template:
        return tokenizer.encode(prompt)
    if not tokenizer.has_chat_template:
        from mlx_flashmoe.console import print_note

        print_note("the checkpoint has no chat template: the prompt is continued as it is")
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    if arguments.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": arguments.system_prompt})
    return tokenizer.apply_chat_template(messages, **_template_variables(arguments, tokenizer))


# chat


def _add_chat(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        allow_abbrev=False,
        help="talk with a converted model in the terminal",
        description="Talk with a converted model. Conversations are saved as they go on; /help lists what else "
        "there is. In a pipe each line is a message (one that ends in a backslash goes on in the next), answers "
        "go to stdout and everything else to stderr.",
    )
    _add_model_flags(parser)
    _add_prefix_flags(parser)
    parser.add_argument("--system-prompt", metavar="TEXT", help="a system message before the conversation")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on with a conversation: the last one, or the one in FILE",
    )
    parser.add_argument(
        "--tools",
        action="append",
        default=[],
        metavar="FILE.py",
        help="functions the model may call: their type hints and docstrings say what it is told of them. May be "
        "given more than once",
    )
    parser.add_argument(
        "--shell", action="store_true", help="let the model run shell commands; each is asked about first"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PREFIX",
        help="with --shell, do not ask about commands that begin with these words and have no special characters, "
        "for example 'git diff'. May be given more than once",
    )
    _add_think_flags(parser)
    _add_generation_flags(parser, max_tokens=8192)
    parser.set_defaults(run=_chat)


def _add_prefix_flags(parser: argparse.ArgumentParser) -> None:
    for flag, size, where in (("--prefix-memory", "1GB", "memory"), ("--prefix-disk", "10GB", "disk")):
        parser.add_argument(
            flag,
            default=size,
            metavar="SIZE",
            help=f"{where} that keeps what the model has read, so that the next prompt that begins the same need "
            "not be read again; 0 keeps nothing (default: %(default)s)",
        )


def _prefix_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``_add_prefix_flags`` has asked of a ``PrefixCache``."""
    from mlx_flashmoe.memory import parse_size
    from mlx_flashmoe.prefix_cache import default_directory

    return {
        "memory_bytes": parse_size(arguments.prefix_memory, "--prefix-memory", ""),
        "disk_bytes": parse_size(arguments.prefix_disk, "--prefix-disk", ""),
        "directory": default_directory(),
    }


def _chat(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from mlx_flashmoe.chat.commands import NAMES
    from mlx_flashmoe.chat.conversation import Conversation
    from mlx_flashmoe.chat.editor import message_reader
    from mlx_flashmoe.chat.functions import load_functions
    from mlx_flashmoe.chat.loop import chat
    from mlx_flashmoe.chat.session import Session, data_directory
    from mlx_flashmoe.chat.settings import Settings
    from mlx_flashmoe.chat.shell import shell_tool
    from mlx_flashmoe.chat.view import chat_view
    from mlx_flashmoe.console import print_note

    # What can be wrong with the flags is found before a model is loaded.
    options, _ = _generation_options(arguments)
    sampling, sampling_line = _sampling(arguments)
    settings = Settings({**sampling, "seed": arguments.seed}, arguments.max_tokens, arguments.think)
    prefixes = _prefix_options(arguments)
    if arguments.allow and not arguments.shell:
        raise RequestError("--allow says which shell commands to run without asking: give --shell, too")
    functions = [f for file in arguments.tools for f in load_functions(Path(file))]
    session = None
    if arguments.resume is not None:
        session = Session.load(Path(arguments.resume)) if arguments.resume else Session.latest()

    from mlx_flashmoe import load
    from mlx_flashmoe.prefix_cache import PrefixCache
    from mlx_flashmoe.terminal.bars import loading_bar

    # From here on, what is typed waits for the first prompt.
    with (
        message_reader(data_directory() / "history", NAMES, print_note) as reader,
        closing(loading_bar()) as bar,
    ):
        functions = [replace(f, call=reader.lend(f.call)) for f in functions]
        if arguments.shell:
            functions.append(shell_tool(arguments.allow, lambda command: reader.ask("Run it?")))
        model, tokenizer = load(
            arguments.model,
            **_load_options(arguments),
            prefix_memory=prefixes["memory_bytes"],
            announce=print_note,
            progress=bar,
        )
        print_note(sampling_line)
        if not tokenizer.has_chat_template:
            raise RequestError("the checkpoint has no chat template: use generate to continue a text")
        if session is None:
            # A conversation in a pipe is saved only where that is asked for.
            session = Session.begin(print_note) if reader.interactive else Session()
        if arguments.system_prompt is not None:
            session.system = arguments.system_prompt
        view = chat_view()
        conversation = Conversation(
            model,
            tokenizer,
            session,
            view,
            functions,
            settings=settings,
            template=_template_variables(arguments, tokenizer),
            prefill_step_size=options["prefill_step_size"],
            prefix_cache=PrefixCache(model.identity, tokenizer.message_start_id, **prefixes, note=print_note),
        )
        if arguments.resume is not None:
            view.recap(session)
        chat(conversation, reader, view)
    return 0


# serve


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        allow_abbrev=False,
        help="answer clients of OpenAI's and Anthropic's APIs",
        description="Serve a converted model over HTTP, with the APIs of OpenAI (/v1/chat/completions, "
        "/v1/completions, /v1/models) and Anthropic (/v1/messages). One request is answered at a time; others "
        "wait in a queue. /metrics has figures for Prometheus, /openapi.json the whole description.",
    )
    _add_model_flags(parser)
    _add_prefix_flags(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; 0.0.0.0 lets other machines connect, and wants an --api-key (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, default=8080, metavar="N", help="0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("MLX_FLASHMOE_API_KEY") or None,
        metavar="KEY",
        help="what clients have to send; other users of this machine can see it here, but not in the environment "
        "variable MLX_FLASHMOE_API_KEY (default: that variable, or none)",
    )
    parser.add_argument(
        "--without-api-key", action="store_true", help="let anybody in that --host lets connect"
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages from there call, for example https://example.org; * for all. May be given more than "
        "once (default: none)",
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=8,
        metavar="N",
        help="requests that wait while one is answered; more are refused (default: %(default)s)",
    )
    _add_sampling_flags(parser)
    _add_think_flags(parser)
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from mlx_flashmoe import load
    from mlx_flashmoe.console import print_note
    from mlx_flashmoe.prefix_cache import PrefixCache
    from mlx_flashmoe.terminal.bars import loading_bar

    try:
        from mlx_flashmoe.server.app import serve
    except ModuleNotFoundError as e:
        raise RequestError(f"serve needs the extra: pip install 'mlx-flashmoe[server]' ({e})") from None
    if arguments.queue < 0:
        raise RequestError(f"--queue should be at least 0, but is {arguments.queue}")

    prefixes = _prefix_options(arguments)
    options = {**_load_options(arguments), "prefix_memory": prefixes["memory_bytes"]}
    sampling, line = _sampling(arguments)
    folder = Path(arguments.model)

    def loaded() -> tuple[StreamingModel, Tokenizer]:
        with closing(loading_bar()) as bar:
            model, tokenizer = load(folder, **options, announce=print_note, progress=bar)
        print_note(line)
        _note_think(arguments, tokenizer)
        return model, tokenizer

    serve(
        loaded,
        folder.resolve().name,
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key,
        without_key=arguments.without_api_key,
        origins=arguments.allow_origin,
        queue_size=arguments.queue,
        sampling=sampling,
        template=_think(arguments),
        make_prefix_cache=lambda model, tokenizer: PrefixCache(
            model.identity, tokenizer.message_start_id, **prefixes, note=print_note
        ),
        announce=print_note,
        log=print_note,
    )
    return 0


# eval


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="measure how good a converted model is",
        description="Measure how good a converted model is: its perplexity on a text, its agreement with another "
        "one, its answers and tool calls on a held-out set, and how evenly its experts are used.",
    )
    _add_model_flags(parser)
    parser.add_argument("--text", metavar="FILE", help="a text, for the perplexity")
    parser.add_argument(
        "--against", metavar="DIR", help="another converted folder, to compare with on the text"
    )
    parser.add_argument(
        "--heldout",
        metavar="FILE",
        help="questions, a JSON object a line: task, thinking, tools, messages, expected",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N questions (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.set_defaults(run=_eval)


@keep_awake()
def _eval(arguments: argparse.Namespace) -> int:
    from mlx_flashmoe import evaluate

    _fetch_model(arguments)
    evaluate.run(
        arguments.model,
        text=arguments.text,
        against=arguments.against,
        heldout=arguments.heldout,
        limit=arguments.limit,
        json_file=arguments.json,
        **_load_options(arguments),
    )
    return 0


# bench


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure a converted model, or the kernels, on this machine",
        description="Time a converted model on random prompts: with nothing in memory (cold), with the files in "
        "the page cache (warm), and while answering; beside plain reads of the same files. Or, with `kernels`, "
        "the expert kernels by themselves.",
    )
    _add_model_flags(parser, required=False)
    parser.add_argument(
        "--prompts",
        type=int,
        nargs="+",
        default=[32, 512],
        metavar="N",
        help="prompt lengths in tokens (default: 32 512)",
    )
    parser.add_argument(
        "--tokens", type=int, default=48, metavar="N", help="tokens of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--no-read-ahead", action="store_true", help="never read the next layer's likely experts in advance"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.set_defaults(run=_bench_model)
    _add_bench_kernels(parser.add_subparsers(title="other benchmarks", metavar="[kernels]"))


def _add_bench_kernels(benches: Any) -> None:
    parser = benches.add_parser(
        "kernels",
        allow_abbrev=False,
        help="the expert kernels, against MLX's own operations and the memory's bandwidth",
        description="Time the expert kernels of this machine on random experts, side by side with MLX's own "
        "operations and the memory's bandwidth. The default shape is an expert of Qwen3.5-397B.",
    )
    for flag, default, text in (
        ("--hidden", 4096, "inputs and outputs of an expert"),
        ("--intermediate", 1024, "width of its middle"),
        ("--slots", 192, "experts in memory to rotate over, so that none is left in a cache"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--bits", type=int, choices=(2, 3, 4, 6, 8), default=4, help="bits per weight (default: %(default)s)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        default=64,
        help="weights that share a scale and a bias (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="to spend on a case (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.set_defaults(run=_bench_kernels)


@keep_awake()
def _bench_model(arguments: argparse.Namespace) -> int:
    from mlx_flashmoe.bench import model

    if arguments.model is None:
        raise RequestError("bench needs --model DIR, or: bench kernels")
    _fetch_model(arguments)
    options = {**_load_options(arguments), "read_ahead": not arguments.no_read_ahead}
    model.run(arguments.model, arguments.prompts, arguments.tokens, arguments.json, **options)
    return 0


@keep_awake()
def _bench_kernels(arguments: argparse.Namespace) -> int:
    from mlx_flashmoe.bench import kernels

    kernels.run(
        arguments.hidden,
        arguments.intermediate,
        arguments.bits,
        arguments.group_size,
        arguments.slots,
        arguments.seconds,
        arguments.json,
    )
    return 0


# doctor


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        allow_abbrev=False,
        help="what to expect of a model on this machine, or on another",
        description="Measure this machine (half a minute, and 256 MB on the disk in question meanwhile), read a "
        "model's headers, and say how fast it will be, what it takes, and what to type. Of a model on the hub nothing "
        "but headers is fetched. Options --sim-... answer for another machine.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder that convert has written, a checkpoint's, or a repository on the Hugging Face hub",
    )
    parser.add_argument(
        "--expert-memory",
        default="auto",
        metavar="SIZE",
        help="as of generate; auto stands for the best setting (default: %(default)s)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=8192,
        metavar="N",
        help="tokens of prompt and answer to count memory for (default: %(default)s)",
    )
    parser.add_argument("--sim-memory", metavar="SIZE", help="of another machine: its memory, as 48GB")
    parser.add_argument("--sim-disk", metavar="RATE", help="how fast its disk reads, as 17.5GB/s")
    parser.add_argument(
        "--sim-bandwidth",
        metavar="RATE",
        help="how fast its GPU reads memory, as 400GB/s; what else a Mac's speed depends on is then as published",
    )
    parser.add_argument("--explain", action="store_true", help="show the arithmetic, and every prediction")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from mlx_flashmoe.doctor import report
    from mlx_flashmoe.doctor.predictions import Other
    from mlx_flashmoe.memory import parse_size

    def given(flag: str, text: str | None, rate: bool) -> int | None:
        if text is None:
            return None
        size = parse_size(text.removesuffix("/s") if rate else text, flag, "/s" if rate else "")
        if size <= 0:
            raise RequestError(f"{flag} {text}: more than nothing is needed")
        return size

    other = Other(
        given("--sim-memory", arguments.sim_memory, False),
        given("--sim-disk", arguments.sim_disk, True),
        given("--sim-bandwidth", arguments.sim_bandwidth, True),
    )
    report.run(
        arguments.model, arguments.expert_memory, arguments.context, other, arguments.json, arguments.explain
    )
    return 0


# models


def _add_models(commands: Any) -> None:
    parser = commands.add_parser(
        "models",
        allow_abbrev=False,
        help="list the architectures that can be converted",
        description="List the model types that can be converted, and how each runs: natively, or on the modules of "
        "mlx-lm or mlx-vlm, if these are installed.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> int:
    from mlx_flashmoe.supported import run

    run(arguments.json)
    return 0


# selftest


def _add_selftest(commands: Any) -> None:
    parser = commands.add_parser(
        "selftest",
        allow_abbrev=False,
        help="find out what works on this machine; needs no model",
        description="Check every part on this machine, in a minute or so and without a model: the kernels against "
        "exact arithmetic, a small random model of each architecture, a conversion that is killed and resumed, and "
        "reads. Exit status 1 if something failed; the last line is to be pasted into an issue.",
    )
    parser.add_argument(
        "--folder",
        metavar="DIR",
        help="a folder on the disk to measure; some 200 MB are written there, and removed (default: the folder for "
        "temporary files)",
    )
    parser.add_argument("--json", metavar="FILE", help="write facts and rows there, too")
    parser.set_defaults(run=_selftest)


def _selftest(arguments: argparse.Namespace) -> int:
    from mlx_flashmoe.selftest.run import run

    return 0 if run(arguments.folder, arguments.json) else 1
