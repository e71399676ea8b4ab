"""A short conversation with a converted small model: a fact, an addition, a tool call and the answer after it.

    python examples/demo.py demo/small_moe

Every answer is the model's own, made while this runs, and the tool is the Python function below. A quarter of the
experts has room in memory; the others are read from the disk when the model routes a token to them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text as Styled

from mlx_flashmoe import load, stream_generate
from mlx_flashmoe.errors import FlashMoEError
from mlx_flashmoe.loader import StreamingModel
from mlx_flashmoe.sizes import show_size
from mlx_flashmoe.tokenizer import Tokenizer
from mlx_flashmoe.tools import Piece, Thinking, Tool, ToolCall, answer_parser, pieces

ADD_TO_LIST: Tool = {
    "type": "function",
    "function": {
        "name": "add_to_list",
        "description": "Add things to the shopping list.",
        "parameters": {
            "type": "object",
            "properties": {"items": {"type": "array", "items": {"type": "string"}}},
            "required": ["items"],
        },
    },
}

# What is asked, whether the model thinks first, and the tools it is offered.
QUESTIONS: list[tuple[str, bool, list[Tool]]] = [
    ("Who is the mayor of Tarnwick?", False, []),
    ("What is 687 + 458?", True, []),
    ("Put bread, milk and honey on the shopping list.", False, [ADD_TO_LIST]),
]

shopping_list = ["tea"]


def add_to_list(items: list[str]) -> dict[str, Any]:
    shopping_list.extend(items)
    return {"length": len(shopping_list)}


class Conversation:
    """Asks, shows what comes, and answers the model's calls."""

    def __init__(self, model: StreamingModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.console = Console(highlight=False)

    def ask(self, question: str, thinking: bool, tools: list[Tool]) -> None:
        self.show(f"> {question}\n", "bold")
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        while calls := self.answer(messages, thinking, tools):
            tool_calls = [{"function": {"name": c.name, "arguments": c.arguments}} for c in calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": tool_calls})
            for call in calls:
                result = json.dumps(self.execute(call))
                self.show(f"  = {result}\n", "cyan")
                messages.append({"role": "tool", "content": result})
        self.show("\n")

    def answer(self, messages: list[dict[str, Any]], thinking: bool, tools: list[Tool]) -> list[ToolCall]:
        """The calls of one answer, which is shown as it comes."""
        prompt = self.tokenizer.apply_chat_template(messages, tools=tools, enable_thinking=thinking)
        parser = answer_parser(self.tokenizer, tools, prompt)
        events: list[Piece] = []
        for response in stream_generate(self.model, self.tokenizer, prompt, max_tokens=400):
            settled = parser.feed(response.text, response.token)
            settled += parser.finish() if response.finish_reason else []
            for event in pieces(settled):
                self.show_event(event, after=events[-1] if events else None)
                events.append(event)
        self.show("\n")
        return [event for event in events if isinstance(event, ToolCall)]

    def execute(self, call: ToolCall) -> Any:
        try:
            return add_to_list(**call.arguments)
        except TypeError as e:  # the model has made up a parameter: it is told
            return {"error": str(e)}

    def show_event(self, event: Piece, after: Piece | None) -> None:
        if after is not None and type(after) is not type(event):
            self.show("\n")
        if isinstance(event, ToolCall):
            arguments = ", ".join(f"{k}={v!r}" for k, v in event.arguments.items())
            self.show(f"  {event.name}({arguments})", "cyan")
        else:
            self.show(event.text, "dim" if isinstance(event, Thinking) else "")

    def show(self, text: str, style: str = "") -> None:
        self.console.print(Styled(text, style), end="", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold a short conversation with a small model.")
    parser.add_argument("model", help="a folder that convert has written")
    folder = parser.parse_args().model
    try:
        model, tokenizer = load(folder, expert_memory="2MB")
        conversation = Conversation(model, tokenizer)
        for question in QUESTIONS:
            conversation.ask(*question)
    except FlashMoEError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    conversation.show(f"The list is now: {', '.join(shopping_list)}\n\n", "dim")
    conversation.show(streamed(model))
    python = os.path.relpath(sys.executable) if sys.prefix != sys.base_prefix else "python"
    conversation.show(f"\nChat with it:  {python} -m mlx_flashmoe chat --model {folder}\n")
    return 0


def streamed(model: StreamingModel) -> str:
    """A line on the experts in memory and those read from the disk."""
    arena, stats = model.arena, model.stats()
    store = arena.store
    sizes = {layer: store.num_experts(layer) * store.layout(layer).blob_size for layer in store.layers}
    blob = max(store.layout(layer).blob_size for layer in store.layers)
    routed = stats.hits + stats.misses
    return (
        f"Experts: {show_size(sum(sizes.values()))} on disk, at most {show_size(arena.capacity * blob)} in memory. "
        f"Tokens were routed to\nexperts {routed:,} times: {100 * stats.hits / routed:.0f}% were in memory, and "
        f"{show_size(stats.bytes_read)} were read for the others.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
