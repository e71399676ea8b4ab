"""Reading back what stands in the question: JSON objects, tables, lists; and writing JSON."""

from __future__ import annotations

import json
from typing import Any

from .arithmetic import comparing
from .draw import Dialogue, Draw, assistant, user

ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]
KEYS = """age city name price size weight colour owner status title year height code page amount level rate length
country street number type date score model brand room floor route speed""".split()


def key(d: Draw) -> str:
    return d.choice(KEYS) if d.chance(0.5) else d.identifier()


def scalar(d: Draw) -> Any:
    kind = d.randint(0, 9)
    if kind < 3:
        return d.randint(0, 999)
    if kind < 5:
        return d.word()
    if kind == 5:
        return d.name()
    if kind == 6:
        return d.phrase()
    if kind == 7:
        return d.code()
    return d.choice([True, False, None, round(d.randint(1, 999) / 10, 1)])


def shown(value: Any) -> str:
    """A value in a sentence: strings without quotes, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def json_lookup(d: Draw) -> Dialogue:
    keys = d.some(lambda: key(d), d.randint(3, 6))
    data: dict[str, Any] = {k: scalar(d) for k in keys}
    questions = [(f"What is the {k}?", f"The {k} is {shown(v)}.") for k, v in data.items()]
    if d.chance(0.5):
        outer = d.choice(keys)
        data[outer] = {k: scalar(d) for k in d.some(lambda: key(d), d.randint(2, 3))}
        questions = [
            (f"What is the {k} of the {outer}?", f"The {k} of the {outer} is {shown(v)}.")
            for k, v in data[outer].items()
        ]
    elif d.chance(0.5):
        outer = d.choice(keys)
        data[outer] = d.some(lambda: d.word(), d.randint(2, 6))
        questions = [
            (
                f"What is the {ORDINALS[i]} element of {outer}?",
                f"The {ORDINALS[i]} element of {outer} is {shown(v)}.",
            )
            for i, v in enumerate(data[outer])
        ]
    question, answer = d.choice(questions)
    text = json.dumps(data, ensure_ascii=False, indent=2 if d.chance(0.3) else None)
    prompt = f"{question}\n{text}" if d.chance(0.5) else f"{text}\n{question}"
    thinking = d.chance(0.4)
    return Dialogue(
        "json lookup", [user(prompt), assistant(answer, "look it up" if thinking else "")], thinking
    )


def json_writing(d: Draw) -> Dialogue:
    data = {
        k: d.word() if isinstance(v, float) else v
        for k, v in ((key(d), scalar(d)) for _ in range(d.randint(1, 4)))
    }
    if d.chance(0.3):
        data[d.choice(list(data))] = d.awkward_phrase()
    parts = [f"{k} {json.dumps(v) if not isinstance(v, str) else v}" for k, v in data.items()]
    question = d.choice(["Write a JSON object with:", "Make a JSON object from this:", "As JSON:"])
    thinking = d.chance(0.4)
    answer = assistant(json.dumps(data, ensure_ascii=False), "keys: " + ", ".join(data) if thinking else "")
    # One property a line, so that values may hold spaces.
    return Dialogue("json writing", [user("\n".join([question, *parts])), answer], thinking)


class Table:
    """Named rows; one or two columns, of numbers or of words."""

    def __init__(self, d: Draw) -> None:
        self.columns = d.some(lambda: key(d), d.randint(1, 2))
        self.numeric = [c for i, c in enumerate(self.columns) if i == 0 or d.chance(0.6)]
        d.random.shuffle(self.columns)
        self.rows = d.some(lambda: d.choice([d.name, d.name, d.word, d.code])(), d.randint(3, 7))
        numbers = {c: d.some(lambda: d.randint(1, 999), len(self.rows)) for c in self.numeric}
        self.cells: dict[tuple[str, str], Any] = {}
        for i, row in enumerate(self.rows):
            for column in self.columns:
                self.cells[row, column] = numbers[column][i] if column in self.numeric else d.word()
        self.style = d.choice(["markdown", "markdown", "csv", "lines"])

    def row(self, name: str) -> str:
        """A row with its columns' names."""
        return f"{name}: " + ", ".join(f"{c} {self.cells[name, c]}" for c in self.columns)

    def text(self) -> str:
        if self.style == "lines":
            return "\n".join(self.row(name) for name in self.rows)
        lines = [["name", *self.columns]]
        lines += [[row, *(str(self.cells[row, c]) for c in self.columns)] for row in self.rows]
        if self.style == "csv":
            return "\n".join(",".join(line) for line in lines)
        rule = "|" + " --- |" * len(lines[0])
        head, *body = ("| " + " | ".join(line) + " |" for line in lines)
        return "\n".join([head, rule, *body])


def _about(table: Table, question: str, d: Draw) -> str:
    return f"{question}\n\n{table.text()}" if d.chance(0.5) else f"{table.text()}\n\n{question}"


def table_lookup(d: Draw) -> Dialogue:
    table = Table(d)
    row, column = d.choice(table.rows), d.choice(table.columns)
    value = table.cells[row, column]
    question = d.choice([f"What is the {column} of {row}?", f"Which {column} does {row} have?"])
    thinking = d.chance(0.7)
    answer = assistant(f"The {column} of {row} is {value}.", table.row(row) if thinking else "")
    return Dialogue("table lookup", [user(_about(table, question, d)), answer], thinking)


def table_reverse(d: Draw) -> Dialogue:
    table = Table(d)
    row, column = d.choice(table.rows), d.choice(table.columns)
    value = table.cells[row, column]
    question = d.choice([f"Which row has the {column} {value}?", f"Whose {column} is {value}?"])
    # A value does not say whose it is: the rows are gone through until one has it.
    first = next(r for r in table.rows if table.cells[r, column] == value)
    steps = [table.row(r) for r in table.rows[: table.rows.index(first) + 1]]
    answer = assistant(f"{first} has the {column} {value}.", steps)
    return Dialogue("table reverse", [user(_about(table, question, d)), answer])


def table_count(d: Draw) -> Dialogue:
    table = Table(d)
    question = d.choice(["How many rows does the table have?", "How many rows are there?", "Count the rows."])
    steps = [f"{i} {row}" for i, row in enumerate(table.rows, 1)]
    return Dialogue(
        "table count", [user(_about(table, question, d)), assistant(f"There are {len(steps)} rows.", steps)]
    )


def table_extreme(d: Draw) -> Dialogue:
    table = Table(d)
    column, largest = d.choice(table.numeric), d.chance(0.5)
    which = "largest" if largest else "smallest"
    question = d.choice([f"Which row has the {which} {column}?", f"Who has the {which} {column}?"])
    best, steps = table.rows[0], [table.row(table.rows[0])]
    for row in table.rows[1:]:
        a, b = table.cells[row, column], table.cells[best, column]
        signs = comparing(a, b)[1:]
        if (a > b) == largest:
            best = row
        steps.append(
            f"{table.row(row)}; {a:03} and {b:03}: {', '.join(signs)}: {best} {table.cells[best, column]}"
        )
    value = table.cells[best, column]
    answer = f"{best} has the {which} {column}: {value}."
    return Dialogue("table extreme", [user(_about(table, question, d)), assistant(answer, steps)])


def listing(d: Draw) -> Dialogue:
    """A plain list: its length, an element, whether something is in it."""
    items = d.some(lambda: d.word(), d.randint(2, 6))
    text = ", ".join(items)
    kind = d.randint(0, 2)
    if kind == 0:
        question, answer = "How many words are in this list?", f"There are {len(items)} words."
        steps = [f"{i} {item}" for i, item in enumerate(items, 1)]
        return Dialogue("listing", [user(f"{question} {text}"), assistant(answer, steps)])
    thinking = d.chance(0.4)
    if kind == 1:
        i = d.randint(0, len(items) - 1)
        question, answer = (
            f"What is the {ORDINALS[i]} word of this list?",
            f"The {ORDINALS[i]} word is {items[i]}.",
        )
        steps = [f"{n} {item}" for n, item in enumerate(items[: i + 1], 1)]
    else:
        there = d.chance(0.5)
        item = d.choice(items) if there else d.word()
        there = item in items
        question = f"Is {item} in this list?"
        answer = f"{'Yes' if there else 'No'}, {item} is {'' if there else 'not '}in the list."
        steps = ["look for it"]
    return Dialogue(
        "listing", [user(f"{question} {text}"), assistant(answer, steps if thinking else "")], thinking
    )
