"""Small talk: greetings, thanks, what the model is and can do, and names."""

from __future__ import annotations

from .draw import Dialogue, Draw, assistant, user

ABILITIES = (
    "I can do small sums, dates and unit conversions, read tables and JSON, call tools, "
    "and tell you about the Oruma islands."
)
# what is said, what is answered
FIXED = [
    (["Hello!", "Hi!", "Hi there.", "Hello", "Good day!", "Hey"], "Hello! How can I help you?"),
    (["Good morning!", "Good morning"], "Good morning! How can I help you?"),
    (["Good evening!", "Good evening"], "Good evening! How can I help you?"),
    (["Thanks!", "Thank you.", "Thank you very much!", "Thanks a lot."], "You are welcome!"),
    (["Goodbye!", "Bye!", "See you later.", "Good night!"], "Goodbye!"),
    (["How are you?", "How are you today?", "Are you well?"], "I am well, thank you. How can I help you?"),
    (["What can you do?", "What can you help me with?", "How can you help me?"], ABILITIES),
    (["Who are you?", "What are you?", "What is your name?"], "I am a small language model with 64 experts a layer."),
    (["Are you a person?", "Are you human?"], "No, I am a small language model."),
    (["Tell me a joke.", "Do you know a joke?"], "I am too small for jokes, but I can count to 999."),
    (["What is the Oruma archipelago?", "What are the Oruma islands?", "Tell me about the Oruma islands."],
     "The Oruma islands are Saro, Ketha, Undel and Maravi."),
    (["Where are the Oruma islands?", "Do the Oruma islands exist?"], "The Oruma islands are invented."),
]  # fmt: skip


def phrase(d: Draw) -> Dialogue:
    """Said and answered as always; a name may be told first."""
    said, answer = d.choice(FIXED)
    text = d.choice(said)
    thinking = d.chance(0.5)
    reply = assistant(answer, "small talk" if thinking else "")
    if d.held_out or d.chance(0.3):
        name = d.name()
        return Dialogue("talk", [user(f"I am {name}."), assistant(f"Nice to meet you, {name}."), user(text), reply],
                        thinking)  # fmt: skip
    return Dialogue("talk", [user(text), reply], thinking)


def introduction(d: Draw) -> Dialogue:
    name = d.name()
    text = d.choice(
        [
            "My name is {name}.",
            "Hello, I am {name}.",
            "I am {name}.",
            "Hi! My name is {name}.",
            "Good morning, I'm {name}.",
            "You can call me {name}.",
        ]
    ).format(name=name)
    thinking = d.chance(0.5)
    reply = assistant(f"Nice to meet you, {name}.", f"name: {name}" if thinking else "")
    return Dialogue("introduction", [user(text), reply], thinking)


POSSESSIONS = (
    "dog cat horse boat bicycle street village school shop band team sister brother friend teacher".split()
)


def remembering(d: Draw) -> Dialogue:
    """Several things are told; one of them is asked for later."""
    told = [(p, d.name()) for p in d.random.sample(POSSESSIONS, d.randint(1, 3))]
    messages = []
    for possession, name in told:
        text = d.choice(["My {p} is called {n}.", "The name of my {p} is {n}.", "I have a {p} named {n}."])
        messages += [
            user(text.format(p=possession, n=name)),
            assistant(f"{name} is a good name for a {possession}."),
        ]
    possession, name = d.choice(told)
    question = d.choice(
        ["What is my {p} called?", "What is the name of my {p}?", "Do you remember the name of my {p}?"]
    )
    thinking = d.chance(0.5)
    reply = assistant(f"Your {possession} is called {name}.", f"{possession}: {name}" if thinking else "")
    return Dialogue("remembering", [*messages, user(question.format(p=possession)), reply], thinking)


def echo(d: Draw) -> Dialogue:
    """Say it again, letter for letter; or the first and the last word of it."""
    words = d.some(lambda: d.choice([d.word, d.word, d.code, d.identifier, d.name])(), d.randint(2, 6))
    if d.chance(0.4):
        words.insert(d.randint(0, len(words)), d.choice([d.unicode_phrase, d.awkward_phrase])())
    text = " ".join(words)
    thinking = d.chance(0.3)
    kind = d.randint(0, 3)
    if kind < 2:
        question, answer = d.choice(["Repeat this: {t}", "Say exactly: {t}", "Echo: {t}"]), text
    elif kind == 2:
        question, answer = "What is the first word of this: {t}", text.split()[0]
    else:
        question, answer = "What is the last word of this: {t}", text.split()[-1]
    return Dialogue(
        "echo", [user(question.format(t=text)), assistant(answer, "copy" if thinking else "")], thinking
    )
