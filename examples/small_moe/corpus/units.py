"""Conversions to a smaller unit, and back where it divides."""

from __future__ import annotations

from .arithmetic import multiplying
from .draw import Dialogue, Draw, assistant, user

# large unit, small unit, how many small ones make a large one, how large numbers get
UNITS = [
    ("kilometres", "metres", 1000, 99),
    ("metres", "centimetres", 100, 99),
    ("centimetres", "millimetres", 10, 999),
    ("kilograms", "grams", 1000, 99),
    ("tonnes", "kilograms", 1000, 99),
    ("litres", "millilitres", 1000, 99),
    ("hours", "minutes", 60, 99),
    ("minutes", "seconds", 60, 99),
    ("weeks", "days", 7, 99),
    ("decades", "years", 10, 99),
    ("centuries", "years", 100, 99),
]


def to_smaller(d: Draw) -> Dialogue:
    large, small, factor, most = d.choice(UNITS)
    count, _ = d.number_pair(f"{large} {small}", lambda: (d.randint(2, most), factor))
    question = d.choice(
        [
            "How many {small} are {n} {large}?",
            "Convert {n} {large} to {small}.",
            "What is {n} {large} in {small}?",
            "{n} {large}: how many {small} is that?",
        ]
    )
    text = question.format(small=small, large=large, n=count)
    answer = f"{count} {large} are {count * factor} {small}."
    return Dialogue("units", [user(text), assistant(answer, _steps(count, large, small, factor))])


def _steps(count: int, large: str, small: str, factor: int) -> list[str]:
    digit, zeros = int(str(factor)[0]), len(str(factor)) - 1
    steps = [f"{large} to {small}: *{factor}"]
    if digit > 1:
        steps += multiplying(count, digit)
    if zeros:
        steps.append(f"{count * digit} and {zeros} zero{'s' * (zeros > 1)}: {count * factor}")
    return steps


def to_larger(d: Draw) -> Dialogue:
    large, small, factor, most = d.choice([u for u in UNITS if set(str(u[2])) == {"1", "0"}])
    count, _ = d.number_pair(f"{small} {large}", lambda: (d.randint(2, most), factor))
    question = d.choice(
        [
            "How many {large} are {n} {small}?",
            "Convert {n} {small} to {large}.",
            "What is {n} {small} in {large}?",
        ]
    )
    zeros = len(str(factor)) - 1
    steps = [
        f"{small} to {large}: /{factor}",
        f"{count * factor} without {zeros} zero{'s' * (zeros > 1)}: {count}",
    ]
    answer = f"{count * factor} {small} are {count} {large}."
    text = question.format(small=small, large=large, n=count * factor)
    return Dialogue("units", [user(text), assistant(answer, steps)])
