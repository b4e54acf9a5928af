"""Draft lists of examples of one kind, question and answer, where the next answer is asked for."""

from collections.abc import Callable, Iterator
from random import Random

from headwise.offline.texts import words
from headwise.offline.texts.document import Draft, Unit

_STYLES = (("Input: ", "\nOutput: "), ("Q: ", "\nA: "), ("", "\n-> "), ("Text: ", "\nLabel: "))


def few_shot(rng: Random) -> Draft:
    """Draft examples of a random kind. A few questions give the next input."""
    kind = rng.choice(_KINDS)
    opening, between = rng.choice(_STYLES)

    def units() -> Iterator[Unit]:
        number = 0
        while True:
            text, answer = kind(rng)
            questions = (
                f"Which answer does this example have? {text}",
                f"Copy the example that comes after this one: {text}",
                f"Which other examples have the answer of this one? {text}",
            )
            yield Unit(text=f"{chr(10) * 2 * (number > 0)}{opening}{text}{between}{answer}", questions=questions)
            number += 1

    nexts = [f"{opening}{kind(rng)[0]}{between}".strip() for _ in range(3)]
    general = (*nexts, *nexts, "Write three more examples of the same kind.", "By which rule do answers follow?")
    return Draft(domain="few-shot", units=units(), general=general)


def _date(rng: Random) -> tuple[str, str]:
    day, month, year = rng.randrange(1, 29), rng.randrange(12), rng.randrange(1950, 2030)
    return f"{day} {words.MONTHS[month]} {year}", f"{year}-{month + 1:02d}-{day:02d}"


def _sum(rng: Random) -> tuple[str, str]:
    who, goods, a, b = rng.choice(words.FIRST), rng.choice(words.GOODS), rng.randrange(3, 60), rng.randrange(3, 60)
    if rng.random() < 0.5:
        return f"{who} has {a} kg of {goods} and buys {b} kg more. How many kg are there now?", str(a + b)
    a, b = max(a, b) + 1, min(a, b)
    return f"There were {a} crates of {goods}, and {who} sold {b}. How many are left?", str(a - b)


_PRAISE = ("works like a dream", "was worth every cent", "arrived early and well packed", "is quieter than I expected")
_BLAME = ("broke after a week", "is far too loud", "came with a cracked lid", "never did what the box says")


def _review(rng: Random) -> tuple[str, str]:
    good = rng.random() < 0.5
    opinion = rng.choice(_PRAISE if good else _BLAME)
    ending = rng.choice(["", f" My sister in {rng.choice(words.TOWNS)} says the same.", f" I paid {words.money(rng)}."])
    return f"The {rng.choice(words.PRODUCTS)} {opinion}.{ending}", "positive" if good else "negative"


def _topic(rng: Random) -> tuple[str, str]:
    subject, line = rng.choice(
        [
            ("sport", "{town} beat {other} by {a} points after a late change of the goalkeeper"),
            ("weather", "Storms reach {town} tonight, with {a} mm of rain until noon"),
            ("business", "Prices of {goods} rise by {a} percent as exports from {town} fall"),
            ("culture", "A theatre in {town} sells {a} tickets for a play about {goods}"),
            ("traffic", "The line from {town} to {other} is closed for {a} days"),
        ]
    )
    town, other = rng.sample(words.TOWNS, 2)
    return line.format(town=town, other=other, a=rng.randrange(2, 90), goods=rng.choice(words.GOODS)), subject


def _extract(rng: Random) -> tuple[str, str]:
    who, town, trade = words.person(rng), rng.choice(words.TOWNS), rng.choice(words.TRADES)
    text = rng.choice(["{who}, a {trade} from {town}, won.", "In {town} the {trade} {who} opened a shop."])
    return text.format(who=who, town=town, trade=trade), f"name={who}; town={town}; trade={trade}"


def _initials(rng: Random) -> tuple[str, str]:
    who = words.person(rng)
    first, last = who.split()
    return who, f"{last}, {first[0]}."


def _order(rng: Random) -> tuple[str, str]:
    chosen = rng.sample(words.GOODS, rng.randrange(3, 6))
    return f"sort: {', '.join(chosen)}", ", ".join(sorted(chosen))


_KINDS: tuple[Callable[[Random], tuple[str, str]], ...] = (_date, _sum, _review, _topic, _extract, _initials, _order)
