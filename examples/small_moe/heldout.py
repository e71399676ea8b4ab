"""Writes the held-out set: dialogues about names, numbers and tools that training never shows.

    python -m examples.small_moe.heldout

A line is one question to the model: ``messages`` up to the user's or a tool's last word, ``tools``, ``thinking``,
and the message that is ``expected``: its content (and tool calls) decide; its thinking is one way to get there.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from .corpus import dialogue

PATH = Path(__file__).with_name("heldout.jsonl")
SEED = 2026
COUNT = 800


def records(count: int = COUNT) -> list[dict[str, Any]]:
    """Alternately the first and the last thing that the model has to say after the user's last message."""
    found = []
    for number in range(count):
        d = dialogue(SEED, number, held_out=True)
        asked = max(i for i, m in enumerate(d.messages) if m["role"] == "user")
        turns = [i for i, m in enumerate(d.messages) if m["role"] == "assistant" and i > asked]
        at = turns[0] if number % 2 else turns[-1]
        expected = d.messages[at]
        task = d.task
        if len(turns) > 1 and at == turns[0]:
            task = task.replace("answer", "call")
        found.append(
            {
                "task": task,
                "thinking": d.thinking,
                "tools": d.tools,
                "messages": d.messages[:at],
                "expected": expected,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out set.")
    parser.add_argument("path", type=Path, nargs="?", default=PATH)
    path = parser.parse_args().path
    found = records()
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found))
    print(f"{path}: {len(found)} questions")
    for task, count in Counter(r["task"] for r in found).most_common():
        print(f"{count:5} {task}")


if __name__ == "__main__":
    main()
