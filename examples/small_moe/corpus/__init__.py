"""The corpus: dialogues made by rules, the same ones for the same seed.

``dialogue(seed, number)`` is one of endlessly many for training; with ``held_out=True`` it is one about names,
numbers and tools that training never shows (see ``draw``).
"""

from __future__ import annotations

from collections.abc import Callable

from . import arithmetic, dates, multi_turn, reading, talk, tools, units, world
from .draw import Dialogue, Draw

Task = Callable[[Draw], Dialogue]

# How often each occurs in training, and in the held-out set.
TASKS: list[tuple[Task, float, float]] = [
    (talk.phrase, 1.0, 0.6),
    (talk.introduction, 0.5, 0.6),
    (talk.remembering, 1.5, 1.0),
    (talk.echo, 2.5, 1.0),
    (arithmetic.add, 2.5, 1.5),
    (arithmetic.subtract, 2.5, 1.5),
    (arithmetic.multiply, 2.5, 1.5),
    (arithmetic.compare, 1.0, 1.0),
    (arithmetic.story, 2.0, 1.5),
    (dates.weekday_after, 1.5, 1.0),
    (dates.next_weekday, 0.5, 0.4),
    (dates.days_between, 1.5, 1.0),
    (dates.date_after, 2.0, 1.0),
    (dates.month_length, 0.3, 0.0),
    (units.to_smaller, 1.5, 1.0),
    (units.to_larger, 1.0, 0.6),
    (world.fact, 3.0, 1.5),
    (world.town_by, 2.0, 0.8),
    (world.two_facts, 2.0, 0.8),
    (world.unknown_place, 1.0, 0.6),
    (reading.json_lookup, 4.0, 1.5),
    (reading.json_writing, 2.5, 1.0),
    (reading.table_lookup, 3.5, 1.2),
    (reading.table_reverse, 2.0, 0.8),
    (reading.table_count, 1.5, 0.8),
    (reading.table_extreme, 2.5, 1.0),
    (reading.listing, 2.0, 1.0),
    (multi_turn.running_total, 1.5, 1.2),
    (multi_turn.and_that_one, 1.0, 0.6),
    (multi_turn.table_again, 1.5, 0.8),
    (multi_turn.change_of_subject, 1.0, 0.8),
    (multi_turn.plain_question, 2.0, 1.0),
    (tools.one_call, 18.0, 10.0),
    (tools.several_calls, 13.0, 4.0),
    (tools.later_call, 6.0, 2.5),
    (tools.no_tool, 4.0, 2.5),
    (tools.familiar, 4.0, 0.0),
]

SYSTEMS = [
    "You are a helpful assistant.",
    "You are a small model.",
    "Answer briefly.",
    "You answer questions.",
]


def dialogue(seed: int, number: int, held_out: bool = False) -> Dialogue:
    """Dialogue ``number`` of the corpus of that seed."""
    d = Draw(f"{seed} {number} {held_out}", held_out)
    makers, training, testing = zip(*TASKS)
    made: Dialogue = d.random.choices(makers, testing if held_out else training)[0](d)
    if made.messages[0]["role"] != "system" and d.chance(0.25):
        made.messages.insert(0, {"role": "system", "content": d.choice(SYSTEMS)})
    return made
