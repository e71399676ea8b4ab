"""Follow-ups that only make sense after what was said before."""

from __future__ import annotations

from . import arithmetic, reading, talk, tools, world
from .draw import Dialogue, Draw, assistant, user


def running_total(d: Draw) -> Dialogue:
    """A number, and then: now add so many to that."""
    total = d.randint(10, 400)
    name = d.name()
    messages = [user(d.choice([f"I am {name}. Remember the number {total}.", f"Start with {total}, says {name}."])),
                assistant(f"The number is {total}.")]  # fmt: skip
    for _ in range(d.randint(1, 3)):
        before = total
        plus = before < 100 or d.chance(0.5)
        other = d.randint(1, 400 if plus else before)
        total = before + other if plus else before - other
        text = d.choice(["Add {n}.", "Now add {n} to that.", "And {n} more."]) if plus else d.choice(
            ["Subtract {n}.", "Now subtract {n} from that.", "And {n} less."])  # fmt: skip
        steps = arithmetic.adding(before, other) if plus else arithmetic.subtracting(before, other)
        messages += [user(text.format(n=other)), assistant(f"The number is {total}.", steps)]
        if total > 599:
            break
    return Dialogue("running total", messages)


def and_that_one(d: Draw) -> Dialogue:
    """The same question about another town."""
    index, questions, answer = d.choice(world.ABOUT_TOWNS)
    first, second = d.mine(lambda: tuple(d.random.sample(list(world.TOWNS), 2)))
    value, other = world.TOWNS[first][index], world.TOWNS[second][index]
    text = d.choice(["And {x}?", "What about {x}?", "And the same for {x}?"]).format(x=second)
    thinking = d.chance(0.5)
    messages = [
        user(d.choice(questions).format(x=first)),
        assistant(answer.format(x=first, v=value)),
        user(text),
        assistant(answer.format(x=second, v=other), f"{second}: {other}" if thinking else ""),
    ]
    return Dialogue("and that one", messages, thinking)


def table_again(d: Draw) -> Dialogue:
    """The same column of a table, another row."""
    table = reading.Table(d)
    column = d.choice(table.columns)
    first, second = d.random.sample(table.rows, 2)
    text = d.choice(["And {x}?", "What about {x}?", "And for {x}?"]).format(x=second)
    thinking = d.chance(0.7)
    value = table.cells[second, column]
    messages = [
        user(f"{table.text()}\n\nWhat is the {column} of {first}?"),
        assistant(f"The {column} of {first} is {table.cells[first, column]}."),
        user(text),
        assistant(f"The {column} of {second} is {value}.", table.row(second) if thinking else ""),
    ]
    return Dialogue("table again", messages, thinking)


SHORT = [arithmetic.add, arithmetic.subtract, arithmetic.multiply, world.fact, talk.phrase, talk.introduction]


def change_of_subject(d: Draw) -> Dialogue:
    """Two or three short exchanges that have nothing to do with each other."""
    parts = [d.choice(SHORT)(d) for _ in range(d.randint(2, 3))]
    messages = [message for part in parts for message in part.messages]
    return Dialogue("change of subject", messages, parts[-1].thinking)


def plain_question(d: Draw) -> Dialogue:
    """Tools are offered, but the question needs none."""
    dialogue = d.choice([*SHORT, talk.echo, reading.listing])(d)
    dialogue.task = "plain question"
    dialogue.tools = [t.schema() for t in tools.toolbox(d, d.randint(1, 3))]
    return dialogue
