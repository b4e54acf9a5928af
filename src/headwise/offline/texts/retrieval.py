"""Draft documents that must be searched: strewn facts, similar keys, several values of a key, steps, counts.

The wordings are our own and not those of a benchmark: what is measured with RULER stays a test of transfer.
"""

from collections.abc import Iterator, Sequence
from random import Random

from headwise.offline.texts import words
from headwise.offline.texts.document import Draft, Unit


def retrieval(rng: Random, number: int, filler: Sequence[str]) -> Draft:
    """Draft one of the kinds, in turn. `filler` are paragraphs to strew facts in."""
    kind = (_strewn, _alike, _visits, _handed_on, _settings, _votes, _serials)[number % 7]
    return kind(rng, filler)


_FACTS = (
    ("By the way, the door code of the {town} office is {number}.", "What is the door code of the {town} office?"),
    ("({person} can be reached at extension {number}.)", "At which extension can {person} be reached?"),
    ("Note: parcel {code} weighs {number} grams.", "How much does parcel {code} weigh?"),
    ("The wifi password in {town} was changed to {code}.", "What was the wifi password in {town} changed to?"),
    ("{person} lives at number {number} of the high street.", "At which number of the high street does {person} live?"),
    ("Remember that invoice {code} is due on {date}.", "When is invoice {code} due?"),
    ("In {town} we met {person}, a {trade}.", "Who did we meet in {town}, and what is that person's trade?"),
    ("Reading {code} of the meter was {number}.", "What was reading {code} of the meter?"),
)


def _facts(rng: Random) -> dict[str, str]:
    return {
        "town": rng.choice(words.TOWNS),
        "person": words.person(rng),
        "number": str(rng.randrange(1_000, 100_000)),
        "code": words.code(rng),
        "date": words.date(rng),
        "trade": rng.choice(words.TRADES),
    }


def _strewn(rng: Random, filler: Sequence[str]) -> Draft:
    """Draft remarks between the paragraphs of a text on something else."""

    def units() -> Iterator[Unit]:
        asked_before: set[str] = set()
        for number, paragraph in enumerate(filler):
            yield Unit(text="\n\n" * (number > 0) + paragraph)
            statement, question = rng.choice(_FACTS)
            facts = _facts(rng)
            question = question.format(**facts)
            if question not in asked_before:
                asked_before.add(question)
                yield Unit(text=f"\n\n{statement.format(**facts)}", questions=(question,) * 2)

    general = (
        "Some remarks do not belong to the text around them. List them all.",
        "What is the text about, apart from the remarks on people, codes and places?",
        "Which numbers are mentioned in remarks, and what do they stand for?",
    )
    return Draft(domain="retrieval", units=units(), general=general)


def _alike(rng: Random, filler: Sequence[str]) -> Draft:
    """Draft keys that differ in one sign."""
    letters = words.code(rng)[:2]
    style = rng.choice(["Shelf {key} holds {value}.", "{key}: {value}", "In crate {key} there are {value}."])

    def units() -> Iterator[Unit]:
        keys = [f"{letters}-{number}" for number in rng.sample(range(1000, 10_000), 9_000)]
        for number, key in enumerate(keys):
            value = f"{rng.randrange(2, 900)} kg of {rng.choice(words.GOODS)} from {rng.choice(words.TOWNS)}"
            questions = (
                f"What is at {key}?",
                f"What is listed right after {key}?",
                f"Where do the goods at {key} come from?",
            )
            yield Unit(text="\n" * (number > 0) + style.format(key=key, value=value), questions=questions)

    goods = rng.choice(words.GOODS)
    general = (f"Which places hold {goods}? List them all.", f"How many entries are about {goods}?", "Repeat the list.")
    return Draft(domain="retrieval", units=units(), general=general)


def _visits(rng: Random, filler: Sequence[str]) -> Draft:
    """Draft several values of each key: where somebody went, over the years."""
    people = list(dict.fromkeys(words.person(rng) for _ in range(7)))

    def units() -> Iterator[Unit]:
        number = 0
        while True:
            who, town, year = rng.choice(people), rng.choice(words.TOWNS), rng.randrange(1961, 2024)
            how = rng.choice(["went to", "spent the summer in", "gave a talk in", "worked in", "was seen in"])
            questions = (
                f"Name all places that {who} has been to.",
                f"What did {who} do in {town}, and in which year?",
                f"Who else has been to {town}?",
            )
            gap = rng.choice([" ", " ", "\n\n"]) if number else ""
            yield Unit(text=f"{gap}In {year} {who} {how} {town}.", questions=questions)
            number += 1

    general = (
        "Who is named most often?",
        "List every person with the towns of that person.",
        "Which year comes up last?",
    )
    return Draft(domain="retrieval", units=units(), general=general)


def _handed_on(rng: Random, filler: Sequence[str]) -> Draft:
    """Draft things that are handed on: every step is needed to know who has them in the end."""
    things = rng.sample(words.PRODUCTS, 5)
    holders = {thing: words.person(rng) for thing in things}

    def units() -> Iterator[Unit]:
        yield Unit(text=" ".join(f"{who} brought the {thing}." for thing, who in holders.items()))
        paragraphs = iter(filler)
        while True:
            thing, new = rng.choice(things), words.person(rng)
            old, holders[thing] = holders[thing], new
            how = rng.choice(["{old} gave the {thing} to {new}.", "{new} borrowed the {thing} from {old}."])
            questions = (
                f"Who has the {thing} at the end?",
                f"Through whose hands did the {thing} go, in order?",
                f"What did {old} do with the {thing}?",
                f"Who had the {thing} before {new}?",
            )
            yield Unit(text=" " + how.format(old=old, new=new, thing=thing), questions=questions)
            if rng.random() < 1 / 6:
                yield Unit(text=f"\n\n{next(paragraphs, 'Then came a break.')}\n\nThen it went on.")

    general = (
        "Who has which thing at the end?",
        "List all people who gave something away.",
        "Which thing moved most often?",
    )
    return Draft(domain="retrieval", units=units(), general=general)


def _settings(rng: Random, filler: Sequence[str]) -> Draft:
    """Draft values that are taken from others, plus or minus something: each needs a few steps back."""
    quantities = ("quota", "limit", "rate", "share", "delay", "bonus")
    names = [f"{team}_{quantity}" for team in words.TEAMS for quantity in quantities]
    rng.shuffle(names)

    def units() -> Iterator[Unit]:
        defined: list[str] = []
        for number in range(10_000):
            name = names[number] if number < len(names) else f"{names[number % len(names)]}_{number // len(names) + 1}"
            base = rng.choice(defined[-9:]) if defined else ""
            if defined and rng.random() < 0.75:
                step = rng.choice(["", f" plus {rng.randrange(1, 20)}", f" minus {rng.randrange(1, 20)}"])
                template = rng.choice(["{name} is the same as {old}{step}.", "For {name}, take {old}{step}."])
                line = template.format(name=name, old=base, step=step)
            else:
                line = f"Set {name} to {rng.randrange(20, 400)}."
            defined.append(name)
            questions = (
                f"What is the value of {name}? Work it out step by step.",
                f"Which line defines {name}?",
                f"Which settings depend on {name}?",
            )
            yield Unit(text="\n" * (number > 0) + line, questions=questions)

    general = ("Which settings are given a number of their own?", "Name three settings with the same value.", "Go on.")
    return Draft(domain="retrieval", units=units(), general=general)


def _votes(rng: Random, filler: Sequence[str]) -> Draft:
    """Draft ballots, in which a few goods come up more often than others."""
    goods = rng.sample(words.GOODS, 12)
    weights = [1 / (place + 1) for place in range(len(goods))]
    style = rng.choice(["{who} voted for {what}.", "{who}: {what}", "Ballot of {who}: {what}."])

    def units() -> Iterator[Unit]:
        number = 0
        while True:
            who, (vote,) = words.person(rng), rng.choices(goods, weights)
            questions = (
                f"What did {who} vote for?",
                f"Whose vote comes right after that of {who}?",
                f"Who voted for {vote}?",
            )
            yield Unit(text="\n" * (number > 0) + style.format(who=who, what=vote), questions=questions)
            number += 1

    general = (
        "Which three got the most votes?",
        f"How many votes did {goods[0]} get?",
        f"Did {goods[1]} or {goods[2]} get more votes?",
        "Count the votes of each.",
    )
    return Draft(domain="retrieval", units=units(), general=general)


def _serials(rng: Random, filler: Sequence[str]) -> Draft:
    """Draft long numbers and to whom they belong, with a text in between."""

    def units() -> Iterator[Unit]:
        paragraphs = iter(filler)
        number = 0
        while True:
            who, serial, replaced = words.person(rng), words.serial(rng), words.serial(rng)
            line = f"Ticket {serial} was opened by {who} and replaces ticket {replaced}."
            questions = (
                f"Who opened ticket {serial}?",
                f"Which ticket did {who} open?",
                f"Which ticket was replaced by {serial}?",
                f"Which ticket replaces {replaced}?",
            )
            yield Unit(text="\n" * (number > 0) + line, questions=questions)
            number += 1
            if number % 5 == 0:
                yield Unit(text=f"\n\n{next(paragraphs, 'Later that day:')}\n")

    general = (
        "List all tickets that were opened.",
        "Who opened the first ticket, and who the last?",
        "Go on with the list.",
    )
    return Draft(domain="retrieval", units=units(), general=general)
