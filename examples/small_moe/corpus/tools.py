"""Tool calls: which tool, which arguments, what its result means, and when there is none.

A tool is drawn from a verb, a noun and parameters of every JSON type. Its description says what it does in the
words a request uses; its name may say it too, or nothing. So what is learned is to read the schema. Arguments are
written in the schema's order, whatever the order of the request.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .draw import Dialogue, Draw, assistant, call, user

VERBS = """add archive book build call cancel check clean close copy count create delete describe draw fetch find fix
hide hire inspect lend list lock mark measure merge move open order paint pause plan play print publish read record
remove rename rent repair reserve reset save scan search sell send share show sign sort start stop store test track
update upload visit weigh wrap""".split()
NOUNS = """account alarm album apple article artist asset backup balance barrel basket battery bed bench bicycle bill
boat bottle box branch bridge bucket budget building bus button cabin cable camera candle car carpet cart castle
chain channel chapter chart church circle clock cloud coat colour contract cookie counter course cup curtain desk
device dish document door draft dress drone drum engine event family farm fence field file flag flight floor flower
folder forest fork fridge game garden gate gift glass glove group guest guitar hall hammer harbour hat helmet horse
hotel invoice island jacket job journey kettle key kitchen label ladder lake lamp layer lesson letter library lid
light line loan lock machine mail map market mask meal medal meeting member menu message meter mirror model module
movie museum name needle network note number office order oven package page painting panel paper parcel park part
party passport path payment pen photo piano picture pipe plan plant plate player playlist pocket poem pool poster
printer product profile project queue quiz radio record recipe report ring river road robot roof room rope route
rule sample sauce scale scarf school screen seat sensor server shelf ship shirt shoe shop sign signal sink sketch
song sound spoon stage stamp station stone story street switch table tank task team tent ticket tile tool tower toy
track trailer train tree trip truck tunnel user valley video village wagon wall watch wheel window wire yard
zone""".split()
WORDS = """age amount area author back base begin body bottom budget category city code colour comment contact count
country currency date day deep delay depth destination detail distance duration email end entry extra factor fast
field filter final first flag format from goal grade grid height hidden hour index inner item kind label language
last left length level limit line list main map mark max message min minute mode month name nick note number offset
open option order origin outer owner page parent part phone place point port position price priority public
quality quantity query range rate rating reason region repeat retry right room route rule scale scope score section
size sort source speed start state status step stop street style subject tag target temperature text time title
token top total type unit urgent user value version volume weight width year zone""".split()


@dataclass
class Parameter:
    """One parameter: its schema, and how a value of it is made."""

    name: str
    schema: dict[str, Any]
    value: Callable[[], Any]


@dataclass
class Tool:
    name: str
    action: str  # in the imperative: "book a harbour"
    parameters: list[Parameter]
    described: str

    def schema(self) -> dict[str, Any]:
        properties = {p.name: p.schema for p in self.parameters}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": self.name, "description": self.described, "parameters": parameters}
        return {"type": "function", "function": function}


def action(d: Draw) -> str:
    """What a tool does."""

    def make() -> str:
        noun = d.syllables() if d.chance(0.25) else d.choice(NOUNS)
        return f"{d.choice(VERBS)} a{'n' if noun[0] in 'aeiou' else ''} {noun}"

    return d.mine(make)


def parameter_name(d: Draw) -> str:
    def make() -> str:
        style = d.randint(0, 9)
        if style < 3:
            return d.choice(WORDS)
        if style < 6:
            return f"{d.choice(WORDS)}_{d.choice(WORDS)}"
        if style < 8:
            return d.choice(WORDS) + d.choice(WORDS).capitalize()
        return d.syllables()

    return d.mine(make)


def parameter(d: Draw, name: str) -> Parameter:
    kinds: list[tuple[dict[str, Any], Callable[[], Any]]] = [
        ({"type": "string"}, lambda: word(d)),
        ({"type": "string"}, lambda: text(d)),
        ({"type": "string"}, lambda: text(d)),
        ({"type": "integer"}, lambda: d.randint(0, d.choice([9, 99, 999, 9999]))),
        ({"type": "number"}, lambda: round(d.randint(1, 9999) / d.choice([10, 100]), 2)),
        ({"type": "boolean"}, lambda: d.chance(0.5)),
        ({"type": ["string", "null"]}, lambda: None if d.chance(0.5) else word(d)),
        ({"type": "array", "items": {"type": "string"}}, lambda: [text(d) for _ in range(d.randint(1, 3))]),
        (
            {"type": "array", "items": {"type": "integer"}},
            lambda: [d.randint(0, 999) for _ in range(d.randint(1, 4))],
        ),
    ]
    choice = d.randint(0, len(kinds) + 2)
    if choice == len(kinds):
        options = d.some(lambda: d.word(), d.randint(2, 3))
        return Parameter(name, {"type": "string", "enum": options}, lambda: d.choice(options))
    if choice > len(kinds):
        inner = [
            Parameter(n, *d.choice(kinds[:6])) for n in d.some(lambda: parameter_name(d), d.randint(1, 3))
        ]
        schema = {"type": "object", "properties": {p.name: p.schema for p in inner}}

        def value() -> dict[str, Any]:
            return {p.name: p.value() for p in inner}

        if d.chance(0.3):
            return Parameter(
                name, {"type": "array", "items": schema}, lambda: [value() for _ in range(d.randint(1, 2))]
            )
        return Parameter(name, schema, value)
    return Parameter(name, *kinds[choice])


def word(d: Draw) -> str:
    return d.choice([d.word, d.word, d.name, d.code, d.identifier])()


def text(d: Draw) -> str:
    """Any string: words, quotes and backslashes, characters beyond ASCII, several lines."""
    kind = d.randint(0, 9)
    if kind < 4:
        return word(d)
    if kind < 6:
        return d.phrase()
    if kind < 8:
        return d.awkward_phrase()
    if kind == 8:
        return d.unicode_phrase()
    return f"{d.phrase(1, 3)}\n{d.awkward_phrase() if d.chance(0.3) else d.phrase(1, 3)}"


def tool(d: Draw, does: str | None = None) -> Tool:
    does = does or action(d)
    verb, _, noun = does.split(" ")
    style = d.randint(0, 19)
    if style < 8:
        name = f"{verb}_{noun}"
    elif style < 12:
        name = verb + noun.capitalize()
    elif style < 16:
        name = f"{noun}_{verb}"
    elif style < 19:
        name = f"{noun}.{verb}"
    else:
        name = d.identifier()
    names = d.some(lambda: parameter_name(d), d.choice([0, 1, 1, 2, 2, 3]))
    return Tool(name, does, [parameter(d, n) for n in names], f"{does.capitalize()}.")


def neighbour(d: Draw, does: str) -> str:
    """Another action, with the same verb or the same noun."""
    verb, article, noun = does.split(" ")

    def make() -> str:
        if d.chance(0.5):
            return f"{d.choice(VERBS)} {article} {noun}"
        other = d.choice(NOUNS)
        return f"{verb} a{'n' if other[0] in 'aeiou' else ''} {other}"

    other = d.mine(make)
    return action(d) if other == does else other


def toolbox(d: Draw, count: int) -> list[Tool]:
    """Tools with different names and actions, some of them easily confused."""
    tools = [tool(d)]
    while len(tools) < count:
        other = tool(d, neighbour(d, d.choice(tools).action) if d.chance(0.4) else None)
        if all(other.name != t.name and other.action != t.action for t in tools):
            tools.append(other)
    return tools


# Requests


def said(value: Any) -> str:
    """A value as a request says it: strings of several words in backticks, objects in parentheses."""
    if isinstance(value, str):
        plain = value.replace("_", "").replace("-", "").isalnum() and value.isascii()
        return value if plain else f"`{value}`"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {said(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(said(v) for v in value) + "]"
    return json.dumps(value)


OPENINGS = [
    "{a}",
    "Please {a}",
    "Could you {a}",
    "I want to {a}",
    "I need you to {a}",
    "Can you {a}",
    "Now {a}",
]


def request(d: Draw, tool: Tool, arguments: dict[str, Any], opening: str | None = None) -> str:
    """The request that these arguments answer: in a sentence, or as a list."""
    begin = (opening or d.choice(OPENINGS)).format(a=tool.action)
    begin = begin[0].upper() + begin[1:]
    end = "?" if begin.startswith(("Could", "Can")) else "."
    order = d.random.sample(list(arguments), len(arguments))
    if not order:
        return begin + end
    if d.chance(0.3):
        return f"{begin}:\n" + "\n".join(f"- {k}: {said(arguments[k])}" for k in order)
    parts = [f"{k} {said(arguments[k])}" for k in order]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"{begin} with {listed}{end}"


def result(d: Draw) -> tuple[str, str]:
    """What a tool returned, as JSON, and what that means in a sentence."""
    kind = d.randint(0, 5)
    if kind == 0:
        return '{"ok": true}', "Done."
    if kind == 1:
        reason = d.phrase(1, 3)
        return json.dumps({"error": reason}), f"That did not work: {reason}."
    values: dict[str, Any] = {
        parameter_name(d): d.choice([lambda: word(d), lambda: d.randint(0, 999), lambda: d.phrase()])()
        for _ in range(d.randint(1, 3))
    }
    parts = [f"the {k} is {v}" for k, v in values.items()]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return json.dumps(values, ensure_ascii=False), listed[0].upper() + listed[1:] + "."


ANNOUNCE = ["Say which tool you use before you use it.", "Before a call, say which tool you use."]


def one_call(d: Draw) -> Dialogue:
    """One request, one call; sometimes its result and the answer."""
    tools = toolbox(d, d.randint(2, 4))
    used = d.choice(tools)
    arguments = {p.name: p.value() for p in used.parameters}
    thinking = d.chance(0.5)
    messages = []
    announced = d.chance(0.15)
    if announced:
        messages.append({"role": "system", "content": d.choice(ANNOUNCE)})
    messages.append(user(request(d, used, arguments)))
    messages.append(
        assistant(
            f"I use {used.name}." if announced else "",
            f"{used.action}: {used.name}" if thinking else "",
            [call(used.name, arguments)],
        )
    )
    task = "tool call"
    if d.chance(0.4):
        task = "tool answer"
        returned, answer = result(d)
        messages.append({"role": "tool", "content": returned})
        messages.append(assistant(answer, "the tool answered" if thinking else ""))
    return Dialogue(task, messages, thinking, [t.schema() for t in tools])


def several_calls(d: Draw) -> Dialogue:
    """Two or three requests in one message: as many calls in one turn."""
    tools = toolbox(d, d.randint(2, 3))
    count = d.choice([2, 2, 3])
    used = [d.choice(tools) for _ in range(count)]
    arguments = [{p.name: p.value() for p in t.parameters} for t in used]
    parts = [
        request(d, t, a, "{a}" if i == 0 else "Then {a}") for i, (t, a) in enumerate(zip(used, arguments))
    ]
    thinking = d.chance(0.5)
    reasoning = "\n".join(f"{t.action}: {t.name}" for t in used)
    calls = [call(t.name, a) for t, a in zip(used, arguments)]
    separator = "\n" if any("\n" in p for p in parts) else " "
    messages = [user(separator.join(parts)), assistant("", reasoning if thinking else "", calls)]
    task = "several calls"
    if d.chance(0.3):
        task = "several answers"
        results = [result(d) for _ in used]
        messages += [{"role": "tool", "content": returned} for returned, _ in results]
        messages.append(assistant("\n".join(a for _, a in results), "the tools answered" if thinking else ""))
    return Dialogue(task, messages, thinking, [t.schema() for t in tools])


def later_call(d: Draw) -> Dialogue:
    """A second request, after a first one was answered."""
    tools = toolbox(d, 2)
    first, second = d.choice(tools), d.choice(tools)
    before, arguments = ({p.name: p.value() for p in t.parameters} for t in (first, second))
    returned, answer = result(d)
    thinking = d.chance(0.5)
    messages = [
        user(request(d, first, before)),
        assistant("", "", [call(first.name, before)]),
        {"role": "tool", "content": returned},
        assistant(answer),
        user(request(d, second, arguments)),
        assistant("", f"{second.action}: {second.name}" if thinking else "", [call(second.name, arguments)]),
    ]
    return Dialogue("later call", messages, thinking, [t.schema() for t in tools])


def no_tool(d: Draw) -> Dialogue:
    """A request that none of the tools can serve: said so, without a call."""
    tools = toolbox(d, d.randint(1, 4))
    taken = [t.action for t in tools]
    wanted = neighbour(d, d.choice(taken)) if d.chance(0.6) else action(d)
    while wanted in taken:
        wanted = action(d)
    absent = tool(d, wanted)
    arguments = {p.name: p.value() for p in absent.parameters}
    thinking = d.chance(0.5)
    answer = assistant(f"Sorry, I have no tool to {wanted}.", f"{wanted}: no tool" if thinking else "")
    messages = [user(request(d, absent, arguments)), answer]
    return Dialogue("no tool", messages, thinking, [t.schema() for t in tools])


# Tools as people know them, asked for as people ask. They are trained on, never held out.

CITIES = "Velmora Quillport Ondelle Lythe Corriden Novik Paris Oslo Lima Cairo Tokyo Zürich".split()


@dataclass
class Known:
    """A familiar tool: its schema's properties, wordings with the arguments' names, what it returns, its topic."""

    name: str
    description: str
    properties: dict[str, Any]
    wordings: list[str]
    arguments: Callable[[Draw], dict[str, Any]]
    returned: Callable[[Draw], dict[str, Any]]
    topic: str

    def schema(self) -> dict[str, Any]:
        parameters = {"type": "object", "properties": self.properties, "required": list(self.properties)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def _city(d: Draw) -> str:
    return d.choice(CITIES) if d.chance(0.5) else d.name()


KNOWN = [
    Known(
        "get_weather",
        "Get the weather of a city.",
        {"city": STRING},
        ["What is the weather in {city}?", "How is the weather in {city}?", "Is it raining in {city}?",
         "What's the weather like in {city}?", "Weather in {city}, please."],
        lambda d: {"city": _city(d)},
        lambda d: {"sky": d.choice(["clear", "cloudy", "grey", "blue"]), "temperature": d.randint(0, 35)},
        "the weather",
    ),
    Known(
        "get_time",
        "Get the local time of a city.",
        {"city": STRING},
        ["What time is it in {city}?", "How late is it in {city}?", "What is the time in {city}?"],
        lambda d: {"city": _city(d)},
        lambda d: {"time": f"{d.randint(0, 23):02}:{d.randint(0, 59):02}"},
        "the time",
    ),
    Known(
        "set_timer",
        "Set a timer.",
        {"minutes": INTEGER},
        ["Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Timer, {minutes} minutes."],
        lambda d: {"minutes": d.randint(2, 99)},
        lambda d: {"timer": d.randint(1, 99)},
        "timers",
    ),
    Known(
        "send_message",
        "Send a message to a person.",
        {"to": STRING, "text": STRING},
        ["Send a message to {to}: {text}", "Write to {to}: {text}", "Tell {to}: {text}"],
        lambda d: {"to": d.name(), "text": d.choice([d.phrase, d.awkward_phrase, d.unicode_phrase])()},
        lambda d: {"message": d.randint(100, 999)},
        "messages",
    ),
    Known(
        "convert_currency",
        "Convert an amount of money.",
        {"amount": INTEGER, "from": STRING, "to": STRING},
        ["How much are {amount} {from} in {to}?", "Convert {amount} {from} to {to}."],
        lambda d: {"amount": d.randint(2, 999), **dict(zip(["from", "to"], d.random.sample(
            "euros dollars pounds yen francs crowns pesos".split(), 2)))},
        lambda d: {"amount": d.randint(2, 999)},
        "money",
    ),
    Known(
        "add_to_list",
        "Add things to the shopping list.",
        {"items": {"type": "array", "items": STRING}},
        ["Put {items} on the shopping list.", "Add {items} to my shopping list.", "I need to buy {items}."],
        lambda d: {"items": d.some(lambda: d.choice(
            "bread milk eggs tea salt rice honey cheese apples soap".split()), d.randint(1, 3))},
        lambda d: {"length": d.randint(3, 40)},
        "shopping lists",
    ),
    Known(
        "find_route",
        "Find the way from a place to a place.",
        {"from": STRING, "to": STRING},
        ["How do I get from {from} to {to}?", "What is the way from {from} to {to}?", "Show me the way from {from} to {to}."],
        lambda d: dict(zip(["from", "to"], d.some(lambda: _city(d), 2))),
        lambda d: {"distance": d.randint(2, 900), "minutes": d.randint(2, 900)},
        "routes",
    ),
    Known(
        "create_event",
        "Create a calendar event.",
        {"title": STRING, "when": {"type": "object", "properties": {"day": STRING, "hour": INTEGER}}},
        ["Put {title} in my calendar on {when}.", "Create an event {title} on {when}.", "I have {title} on {when}."],
        lambda d: {"title": d.choice([d.word, d.name])(), "when": {"day": d.choice(
            "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()), "hour": d.randint(1, 23)}},
        lambda d: {"event": d.randint(100, 999)},
        "calendars",
    ),
    Known(
        "turn_light",
        "Turn the light of a room on or off.",
        {"room": STRING, "on": {"type": "boolean"}},
        ["Turn the light in the {room} {on}.", "Light {on} in the {room}, please.", "Switch {on} the light in the {room}."],
        lambda d: {"room": d.choice("kitchen bathroom bedroom hall cellar garden office".split()), "on": d.chance(0.5)},
        lambda d: {"light": d.choice(["on", "off"])},
        "lights",
    ),
    Known(
        "look_up",
        "Look up a word in the dictionary.",
        {"word": STRING},
        ["What does {word} mean?", "Look up {word}.", "What is the meaning of {word}?"],
        lambda d: {"word": d.word()},
        lambda d: {"meaning": d.phrase()},
        "dictionaries",
    ),
]  # fmt: skip


def _worded(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return value[0] if len(value) == 1 else ", ".join(value[:-1]) + " and " + value[-1]
    if isinstance(value, dict):
        return f"{value['day']} at {value['hour']}"
    return str(value)


def familiar(d: Draw) -> Dialogue:
    """Everyday tools: asked for in everyday words, among others; and missing."""
    offered = d.random.sample(KNOWN, d.randint(1, 4))
    thinking = d.chance(0.5)
    tools = [t.schema() for t in offered]
    if d.chance(0.2):
        absent = d.choice([t for t in KNOWN if t not in offered])
        arguments = absent.arguments(d)
        text = d.choice(absent.wordings).format(**{k: _worded(v) for k, v in arguments.items()})
        reply = assistant(
            f"Sorry, I have no tool for {absent.topic}.", f"{absent.topic}: no tool" if thinking else ""
        )
        return Dialogue("familiar", [user(text), reply], thinking, tools)
    used = d.choice(offered)
    arguments = used.arguments(d)
    text = d.choice(used.wordings).format(**{k: _worded(v) for k, v in arguments.items()})
    messages = [user(text)]
    messages.append(
        assistant("", f"{used.topic}: {used.name}" if thinking else "", [call(used.name, arguments)])
    )
    if d.chance(0.5):
        values = used.returned(d)
        parts = " and ".join(f"the {k} is {v}" for k, v in values.items())
        messages.append({"role": "tool", "content": json.dumps(values)})
        messages.append(
            assistant(parts[0].upper() + parts[1:] + ".", "the tool answered" if thinking else "")
        )
    return Dialogue("familiar", messages, thinking, tools)
