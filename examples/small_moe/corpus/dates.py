"""The calendar: weekdays after so many days, and days within and between months."""

from __future__ import annotations

from .arithmetic import adding, subtracting
from .draw import Dialogue, Draw, assistant, user

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]


def weekday_after(d: Draw) -> Dialogue:
    today, days = d.number_pair("weekday", lambda: (d.randint(0, 6), d.randint(2, 99)))
    later = d.choice(
        [
            "Today is {day}. What day is it in {n} days?",
            "It is {day}. Which weekday is {n} days later?",
            "What weekday comes {n} days after a {day}?",
        ]
    )
    rest = days % 7
    steps = [f"{days}=7*{days // 7}+{rest}", WEEKDAYS[today]]
    steps += [f"+{i} {WEEKDAYS[(today + i) % 7]}" for i in range(1, rest + 1)]
    answer = f"It is a {WEEKDAYS[(today + days) % 7]}."
    return Dialogue("weekday", [user(later.format(day=WEEKDAYS[today], n=days)), assistant(answer, steps)])


def next_weekday(d: Draw) -> Dialogue:
    """The day after or before: known by heart, no thinking needed."""
    today, name = d.randint(0, 6), d.name()
    after = d.chance(0.5)
    which, day = ("tomorrow", today + 1) if after else ("yesterday", today - 1)
    verb = "is" if after else "was"
    question = d.choice(
        [
            f"{name} says that today is {WEEKDAYS[today]}. What day {verb} {which}?",
            f"I am {name}, and it is {WEEKDAYS[today]}. What day {verb} it {which}?",
        ]
    )
    answer = f"{which.capitalize()} {verb} {WEEKDAYS[day % 7]}."
    thinking = d.chance(0.5)
    steps = f"today {WEEKDAYS[today]}, {which} {WEEKDAYS[day % 7]}" if thinking else ""
    return Dialogue("next weekday", [user(question), assistant(answer, steps)], thinking)


def days_between(d: Draw) -> Dialogue:
    month = d.randint(0, 11)
    last, first = d.number_pair(
        f"between {month}",
        lambda: tuple(sorted(d.some(lambda: d.randint(1, DAYS[month]), 2), reverse=True)),  # type: ignore[arg-type,return-value]
    )
    question = d.choice(
        [
            "How many days are there from {m} {a} to {m} {b}?",
            "How many days lie between {m} {a} and {m} {b}?",
            "It is {m} {a}. How many days are left until {m} {b}?",
        ]
    )
    days = last - first
    answer = f"{days} day{'' if days == 1 else 's'}."
    text = question.format(m=MONTHS[month], a=first, b=last)
    return Dialogue("days between", [user(text), assistant(answer, subtracting(last, first))])


def date_after(d: Draw) -> Dialogue:
    month = d.randint(0, 11)
    day, days = d.number_pair(f"date {month}", lambda: (d.randint(1, DAYS[month]), d.randint(2, 27)))
    question = d.choice(
        [
            "What date is {n} days after {m} {a}?",
            "Today is {m} {a}. What is the date in {n} days?",
            "A letter sent on {m} {a} takes {n} days. On what date does it arrive?",
        ]
    )
    total = day + days
    steps = [*adding(day, days), f"{MONTHS[month]} has {DAYS[month]} days"]
    if total > DAYS[month]:
        steps += [f"{total}>{DAYS[month]}", *subtracting(total, DAYS[month])]
        total, month_after = total - DAYS[month], (month + 1) % 12
    else:
        month_after = month
        steps.append(f"{total}<={DAYS[month]}")
    answer = f"It is {MONTHS[month_after]} {total}."
    text = question.format(n=days, m=MONTHS[month], a=day)
    return Dialogue("date after", [user(text), assistant(answer, steps)])


def month_length(d: Draw) -> Dialogue:
    month, year_ago, name = d.randint(0, 11), d.chance(0.3), d.name()
    question = d.choice([f"How many days does {MONTHS[month]} have?", f"{MONTHS[month]} has how many days?"])
    if year_ago:
        question = f"{name} asks: {question}"
    days = f"{DAYS[month]} days, and 29 in a leap year" if month == 1 else f"{DAYS[month]} days"
    answer = f"{MONTHS[month]} has {days}."
    thinking = d.chance(0.5)
    return Dialogue(
        "month length", [user(question), assistant(answer, MONTHS[month] if thinking else "")], thinking
    )
