"""Random rows of all forms."""

import json
import random

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "what",
    "Paris",
    "no",
    "21",
]


def sentence(rng, most=30):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most))) + rng.choice(".?! \u00e9")


def messages(rng, most_turns=3):
    turns = [{"role": "system", "content": sentence(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, most_turns)):
        turns.append({"role": "user", "content": sentence(rng)})
        turns.append({"role": "assistant", "content": sentence(rng)})
    return turns


def sharegpt(rng):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages(rng)]


def mixed(num_rows, seed=0):
    """Rows of chats in both forms and of plain text, in random order."""
    rng = random.Random(seed)
    forms = (
        lambda: {"messages": messages(rng)},
        lambda: {"conversations": sharegpt(rng)},
        lambda: {"text": sentence(rng, 60)},
    )
    return [rng.choice(forms)() for _ in range(num_rows)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_messages(row):
    """A chat row's messages, as the templates know them."""
    if "messages" in row:
        return row["messages"]
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    turns = row["conversations"]
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
