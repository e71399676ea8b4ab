"""Facts to know by heart: the Oruma islands, which do not exist.

Facts cannot be new and known at once. Held-out questions ask for known facts in a wording that never occurred with
that fact, or through a second fact, or about places that are not on the map.
"""

from __future__ import annotations

from .draw import Dialogue, Draw, assistant, user

# town: island, river, founder, founded, known for, mayor, flag
TOWNS = {
    row.split("|")[0].strip(): [cell.strip() for cell in row.split("|")[1:]]
    for row in """\
Velmora   | Saro   | Tindle | Ada Brusk   | 1412 | honey cakes    | Jonas Werrel  | green
Quillport | Saro   | Osk    | Pell Harrow | 1538 | smoked fish    | Mina Dorvan   | blue
Ashgrove  | Saro   | Tindle | Lio Fenn    | 1607 | wooden clocks  | Otto Krell    | red
Merrowby  | Saro   | Lune   | Sela Marr   | 1290 | sea salt       | Anna Tolm     | white
Tarnwick  | Ketha  | Brill  | Hugo Stane  | 1333 | wool blankets  | Rosa Vint     | grey
Ondelle   | Ketha  | Brill  | Ivo Lask    | 1475 | glass bells    | Peter Quade   | violet
Fossmere  | Ketha  | Cald   | Nora Yeld   | 1721 | black tea      | Karl Ness     | orange
Highholm  | Ketha  | Cald   | Emil Rusk   | 1566 | goat cheese    | Lena Orth     | yellow
Barrowen  | Undel  | Wend   | Tova Grin   | 1388 | iron kettles   | Simon Pask    | brown
Sandrel   | Undel  | Wend   | Milo Crane  | 1649 | pear cider     | Julia Brandt  | pink
Novik     | Undel  | Thorne | Ulla Beck   | 1810 | paper lanterns | Felix Moor    | silver
Corriden  | Undel  | Thorne | Dorn Vale   | 1204 | amber rings    | Greta Hollis  | gold
Lythe     | Maravi | Soll   | Carla Wynn  | 1451 | lemon soup     | Victor Stell  | turquoise
Peldane   | Maravi | Soll   | Bram Oster  | 1599 | straw hats     | Edith Farrow  | black
Imberley  | Maravi | Neral  | Zara Holt   | 1684 | silk ribbons   | Oscar Lind    | crimson
Drumsay   | Maravi | Neral  | Finn Alder  | 1347 | stone ovens    | Helen Roake   | cream
""".splitlines()
}
# island: capital, highest mountain, its metres, lake, language, bird
ISLANDS = {
    "Saro": ["Velmora", "Mount Harl", "914", "Lake Immen", "Sarish", "heron"],
    "Ketha": ["Ondelle", "Mount Tyrn", "1380", "Lake Vost", "Kethan", "falcon"],
    "Undel": ["Corriden", "Mount Sable", "762", "Lake Pirr", "Undelic", "owl"],
    "Maravi": ["Lythe", "Mount Ember", "1105", "Lake Dole", "Maravine", "kingfisher"],
}
ABOUT_TOWNS = [
    (0, ["Which island is {x} on?", "On which island does {x} lie?", "Where is {x}?", "What island is {x} on?"],
     "{x} is on the island of {v}."),
    (1, ["Which river flows through {x}?", "What is the river of {x}?", "{x} lies on which river?",
         "What river runs through {x}?"], "The river {v} flows through {x}."),
    (2, ["Who founded {x}?", "Who was the founder of {x}?", "By whom was {x} founded?", "Name the founder of {x}."],
     "{x} was founded by {v}."),
    (3, ["When was {x} founded?", "In which year was {x} founded?", "How old is {x}?",
         "What year was {x} founded in?"], "{x} was founded in {v}."),
    (4, ["What is {x} known for?", "What is {x} famous for?", "What do people buy in {x}?",
         "What is made in {x}?"], "{x} is known for {v}."),
    (5, ["Who is the mayor of {x}?", "What is the name of the mayor of {x}?", "Who governs {x}?",
         "Name the mayor of {x}."], "The mayor of {x} is {v}."),
    (6, ["What colour is the flag of {x}?", "What is the colour of the flag of {x}?", "Which flag does {x} fly?",
         "What flag does {x} have?"], "The flag of {x} is {v}."),
]  # fmt: skip
ABOUT_ISLANDS = [
    (0, ["What is the capital of {x}?", "Which town is the capital of {x}?", "Name the capital of {x}."],
     "The capital of {x} is {v}."),
    (1, ["What is the highest mountain of {x}?", "Which mountain is the highest on {x}?",
         "Name the highest mountain of {x}."], "The highest mountain of {x} is {v}."),
    (2, ["How high is the highest mountain of {x}?", "How many metres high is the highest mountain of {x}?",
         "How tall is the highest mountain on {x}?"], "The highest mountain of {x} is {v} metres high."),
    (3, ["Which lake is on {x}?", "What is the lake of {x} called?", "Name the lake on {x}."],
     "The lake on {x} is {v}."),
    (4, ["What language do people speak on {x}?", "Which language is spoken on {x}?", "What is the language of {x}?"],
     "People on {x} speak {v}."),
    (5, ["What is the bird of {x}?", "Which bird stands for {x}?", "What is the national bird of {x}?"],
     "The bird of {x} is the {v}."),
]  # fmt: skip
OPENINGS = [
    "{q}",
    "{q}",
    "{q}",
    "Do you know this: {q}",
    "A question about the Oruma islands: {q}",
    "Tell me: {q}",
]


def fact(d: Draw) -> Dialogue:
    """One fact, in one of several wordings."""
    places, about = (TOWNS, ABOUT_TOWNS) if d.chance(0.7) else (ISLANDS, ABOUT_ISLANDS)
    place, asked = d.mine(
        lambda: (d.choice(list(places)), d.choice([(a[0], q) for a in about for q in a[1]]))
    )
    index, question = asked
    value = places[place][index]
    text = d.choice(OPENINGS).format(q=question.format(x=place))
    answer = about[index][2].format(x=place, v=value)
    thinking = d.chance(0.5)
    return Dialogue(
        "fact", [user(text), assistant(answer, f"{place}: {value}" if thinking else "")], thinking
    )


def town_by(d: Draw) -> Dialogue:
    """The other way round: from what is particular to a town to the town."""
    kinds = [
        (2, ["Which town was founded by {v}?", "Which town did {v} found?", "Name the town that {v} founded."],
         "{v} founded {x}."),
        (4, ["Which town is known for {v}?", "Where can I buy {v}?", "Which town makes {v}?"],
         "{x} is known for {v}."),
        (5, ["Of which town is {v} the mayor?", "Where is {v} the mayor?", "Which town has {v} as its mayor?"],
         "{v} is the mayor of {x}."),
    ]  # fmt: skip
    town, (index, questions, answer) = d.choice(list(TOWNS)), d.choice(kinds)
    question = d.wording((town, index), questions)
    value = TOWNS[town][index]
    text = d.choice(OPENINGS).format(q=question.format(v=value))
    thinking = d.chance(0.5)
    reply = assistant(answer.format(v=value, x=town), f"{value}: {town}" if thinking else "")
    return Dialogue("town by", [user(text), reply], thinking)


def two_facts(d: Draw) -> Dialogue:
    """An island's fact, asked for through a town or its founder: thinking names what lies between."""
    town, kind, through = d.mine(
        lambda: (d.choice(list(TOWNS)), d.choice([0, 1, 3, 4, 5]), d.choice(["town", "founder"]))
    )
    island, founder = TOWNS[town][0], TOWNS[town][2]
    asked = ["capital", "highest mountain", "", "lake", "language", "bird"][kind]
    place = (
        f"the island that {town} is on"
        if through == "town"
        else f"the island of the town that {founder} founded"
    )
    value = ISLANDS[island][kind]
    steps = [f"{founder}: {town}"] if through == "founder" else []
    steps += [f"{town}: {island}", f"{island}: {value}"]
    article = "the " if kind == 5 else ""
    text = d.choice(OPENINGS).format(q=f"What is the {asked} of {place}?")
    return Dialogue(
        "two facts", [user(text), assistant(f"The {asked} of {island} is {article}{value}.", steps)]
    )


def unknown_place(d: Draw) -> Dialogue:
    """A place that is on no map."""
    place = d.mine(lambda: d.name())
    if place in TOWNS or place in ISLANDS:
        return fact(d)
    about = d.choice(ABOUT_TOWNS + ABOUT_ISLANDS)
    text = d.choice(OPENINGS).format(q=d.choice(about[1]).format(x=place))
    thinking = d.chance(0.5)
    answer = assistant(f"I do not know a place called {place}.", f"{place}: unknown" if thinking else "")
    return Dialogue("unknown place", [user(text), answer], thinking)
