"""Written arithmetic, digit by digit: sums, differences, products with one digit, and which number is larger.

The steps are what makes it learnable: no line needs more than the tables of one digit.
"""

from __future__ import annotations

from .draw import Dialogue, Draw, assistant, user

THINGS = "apples books boxes cards chairs coins cups eggs flowers keys lamps letters pens plates shells stones".split()


def adding(a: int, b: int) -> list[str]:
    """The lines of a + b; the last ends with the result."""
    width = max(len(str(a)), len(str(b)))
    lines, digits, carry = [f"{a:0{width}}+{b:0{width}}"], "", 0
    for i in range(width):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        extra = "+1" if carry else ""
        carry = total // 10
        digits = f"{total % 10}{digits}"
        lines.append(f"{x}+{y}{extra}={total}, write {total % 10}, carry {carry}")
    return [*lines, f"{carry}{digits}, so {a + b}"]


def subtracting(a: int, b: int) -> list[str]:
    """The lines of a - b, a at least b."""
    width = len(str(a))
    lines, digits, borrow = [f"{a}-{b:0{width}}"], "", 0
    for i in range(width):
        x, y = a // 10**i % 10, b // 10**i % 10
        extra = "-1" if borrow else ""
        digit, borrow = (x - y - borrow) % 10, int(x - y - borrow < 0)
        digits = f"{digit}{digits}"
        lines.append(f"{'1' * borrow}{x}-{y}{extra}={digit}, write {digit}, borrow {borrow}")
    return [*lines, f"{digits}, so {a - b}"]


def multiplying(a: int, b: int) -> list[str]:
    """The lines of a * b, b of one digit."""
    lines, digits, carry = [f"{a}*{b}"], "", 0
    for i in range(len(str(a))):
        x = a // 10**i % 10
        total = x * b + carry
        extra = f"+{carry}" if carry else ""
        product = f"{x}*{b}={x * b}" + (f", {x * b}{extra}={total}" if carry else "")
        carry = total // 10
        digits = f"{total % 10}{digits}"
        lines.append(f"{product}, write {total % 10}, carry {carry}")
    return [*lines, f"{carry}{digits}, so {a * b}"]


def comparing(a: int, b: int) -> list[str]:
    """The lines that tell which of two different numbers is larger."""
    width = max(len(str(a)), len(str(b)))
    lines = [f"{a:0{width}} and {b:0{width}}"]
    for x, y in zip(f"{a:0{width}}", f"{b:0{width}}"):
        sign = "=" if x == y else "<" if x < y else ">"
        lines.append(f"{x}{sign}{y}")
        if sign != "=":
            break
    return lines


def number(d: Draw) -> int:
    """Of one to three digits, each length as likely as fits."""
    return d.randint(*d.choice([(1, 9), (10, 99), (10, 99), (100, 999), (100, 999)]))


def addends(d: Draw) -> tuple[int, int]:
    return d.number_pair("+", lambda: (number(d), number(d)))


def minuend_subtrahend(d: Draw) -> tuple[int, int]:
    return d.number_pair("-", lambda: tuple(sorted((number(d), number(d)), reverse=True)))  # type: ignore[arg-type]


def factors(d: Draw) -> tuple[int, int]:
    return d.number_pair("*", lambda: (number(d), d.randint(2, 9)))


def add(d: Draw) -> Dialogue:
    a, b = addends(d)
    question = d.choice(
        [
            "What is {a} + {b}?",
            "{a} + {b} = ?",
            "Add {a} and {b}.",
            "What is {a} plus {b}?",
            "How much is {a} and {b} together?",
            "Please calculate {a} + {b}.",
        ]
    )
    answer = assistant(f"{a} + {b} = {a + b}", adding(a, b))
    return Dialogue("add", [user(question.format(a=a, b=b)), answer])


def subtract(d: Draw) -> Dialogue:
    a, b = minuend_subtrahend(d)
    question = d.choice(
        [
            "What is {a} - {b}?",
            "{a} - {b} = ?",
            "Subtract {b} from {a}.",
            "What is {a} minus {b}?",
            "Take {b} away from {a}.",
            "Please calculate {a} - {b}.",
        ]
    )
    answer = assistant(f"{a} - {b} = {a - b}", subtracting(a, b))
    return Dialogue("subtract", [user(question.format(a=a, b=b)), answer])


def multiply(d: Draw) -> Dialogue:
    a, b = factors(d)
    question = d.choice(
        [
            "What is {a} * {b}?",
            "{a} * {b} = ?",
            "Multiply {a} by {b}.",
            "What is {a} times {b}?",
            "Please calculate {a} * {b}.",
        ]
    )
    answer = assistant(f"{a} * {b} = {a * b}", multiplying(a, b))
    return Dialogue("multiply", [user(question.format(a=a, b=b)), answer])


def compare(d: Draw) -> Dialogue:
    a, b = d.number_pair("<", lambda: tuple(d.some(lambda: number(d), 2)))  # type: ignore[arg-type]
    larger = d.chance(0.5)
    which = "larger" if larger else "smaller"
    question = d.choice(
        [
            "Which is {which}, {a} or {b}?",
            "Which number is {which}: {a} or {b}?",
            "{a} or {b}: which is {which}?",
        ]
    )
    best, other = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    answer = assistant(f"{best} is {which} than {other}.", comparing(a, b))
    return Dialogue("compare", [user(question.format(which=which, a=a, b=b)), answer])


def story(d: Draw) -> Dialogue:
    """A sum, difference or product in words."""
    name, other, things = d.name(), d.name(), d.choice(THINGS)
    kind = d.randint(0, 2)
    if kind == 0:
        a, b = addends(d)
        question = d.choice(
            [
                f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
                f"{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
            ]
        )
        return Dialogue("story", [user(question), assistant(f"{name} has {a + b} {things}.", adding(a, b))])
    if kind == 1:
        a, b = minuend_subtrahend(d)
        question = d.choice(
            [
                f"{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} have left?",
                f"{name} had {a} {things} and lost {b}. How many {things} does {name} have left?",
            ]
        )
        return Dialogue(
            "story", [user(question), assistant(f"{name} has {a - b} {things}.", subtracting(a, b))]
        )
    a, b = factors(d)
    question = d.choice(
        [
            f"{name} buys {b} bags with {a} {things} in each. How many {things} does {name} have?",
            f"{name} has {b} bags. Each holds {a} {things}. How many {things} does {name} have?",
        ]
    )
    return Dialogue("story", [user(question), assistant(f"{name} has {a * b} {things}.", multiplying(a, b))])
