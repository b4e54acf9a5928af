"""Tables, JSON records, log lines and lists of settings: every record has facts that can be looked up."""

import json
from collections.abc import Callable, Iterator, Mapping
from random import Random

from headwise.texts import words
from headwise.texts.document import Draft, Unit

Fields = dict[str, str]


def table(rng: Random) -> Draft:
    """Orders or staff, as CSV or Markdown."""
    make, key, whole = rng.choice([(_order, "order", _OF_ORDERS), (_employee, "badge", _OF_STAFF)])
    return Draft(domain="table", units=rng.choice([_csv, _markdown])(rng, make, key), whole=whole)


def records(rng: Random) -> Draft:
    """JSON, a log, or settings."""
    style = rng.choice([_json_array, _json_lines, _settings])
    make, key, whole = rng.choice([(_order, "order", _OF_ORDERS), (_employee, "badge", _OF_STAFF)])
    if rng.random() < 1 / 3:
        return Draft(domain="records", units=_log(rng), whole=_OF_LOGS)
    return Draft(domain="records", units=style(rng, make, key), whole=whole)


_OF_ORDERS = (
    "Which orders were cancelled? List their numbers.",
    "How many orders were shipped?",
    "Which customer spent most on one order, and how much?",
    "List the towns that orders went to, each once.",
    "Add the next record in the same format.",
    "Which order is the oldest?",
)
_OF_STAFF = (
    "List everybody who works in logistics.",
    "How many people started before 2010?",
    "Who earns most, and in which town?",
    "Which teams are there? Name each once.",
    "Add the next record in the same format.",
    "Who has been there longest?",
)
_OF_LOGS = (
    "List all lines that report an error.",
    "Which service logs most often?",
    "Which user was locked out, and when?",
    "What happened last?",
    "Add the next line in the same format.",
    "How many warnings are there?",
)


def _order(rng: Random) -> Fields:
    return {
        "order": words.code(rng),
        "customer": words.person(rng),
        "product": rng.choice(words.PRODUCTS),
        "pieces": str(rng.randrange(1, 40)),
        "price": words.money(rng),
        "town": rng.choice(words.TOWNS),
        "date": words.date(rng),
        "state": rng.choice(words.STATES),
    }


def _employee(rng: Random) -> Fields:
    return {
        "badge": words.code(rng),
        "name": words.person(rng),
        "team": rng.choice(words.TEAMS),
        "town": rng.choice(words.TOWNS),
        "start": words.date(rng),
        "salary": str(rng.randrange(2100, 9800, 10)),
        "phone": f"+{rng.randrange(30, 99)} {rng.randrange(100, 999)} {rng.randrange(10_000, 99_999)}",
    }


def _drawn(rng: Random, make: Callable[[Random], Fields], key: str) -> Iterator[Fields]:
    """Records of some of the fields, no key twice."""
    names = list(make(rng))
    shown = [key, *(name for name in names if name != key and rng.random() < 0.8)][:7]
    taken: set[str] = set()
    while True:
        fields = make(rng)
        if fields[key] not in taken:
            taken.add(fields[key])
            yield {name: fields[name] for name in (shown if len(shown) > 2 else names)}


def _asked(fields: Fields, key: str, line: str) -> tuple[str, ...]:
    others = [name for name in fields if name != key]
    looked_up = [f"What is the {name} of {key} {fields[key]}?" for name in others]
    person = "customer" if "customer" in fields else "name"
    backwards = [f"Which {key} belongs to {fields[person]}? Copy the record."] if person in fields else []
    start = line.strip()[:24].rstrip()
    return (*looked_up, *backwards, f"Copy the record of {key} {fields[key]} and the one after it.", f"Copy: {start} ...")


def _csv(rng: Random, make: Callable[[Random], Fields], key: str) -> Iterator[Unit]:
    mark = rng.choice([",", ";", "\t"])
    for number, fields in enumerate(_drawn(rng, make, key)):
        line = mark.join(fields.values())
        yield Unit(text="\n" * (number > 0) + (mark.join(fields) + "\n") * (number == 0) + line, questions=_asked(fields, key, line))


def _markdown(rng: Random, make: Callable[[Random], Fields], key: str) -> Iterator[Unit]:
    for number, fields in enumerate(_drawn(rng, make, key)):
        head = f"| {' | '.join(fields)} |\n|{'---|' * len(fields)}" if number == 0 else ""
        line = f"\n| {' | '.join(fields.values())} |"
        yield Unit(text=head + line, questions=_asked(fields, key, line))


def _json_array(rng: Random, make: Callable[[Random], Fields], key: str) -> Iterator[Unit]:
    for number, fields in enumerate(_drawn(rng, make, key)):
        body = ",\n".join(f'    "{name}": {json.dumps(value)}' for name, value in fields.items())
        yield Unit(text=f"{'[' if number == 0 else ','}\n  {{\n{body}\n  }}", questions=_asked(fields, key, "")[:-1])


def _json_lines(rng: Random, make: Callable[[Random], Fields], key: str) -> Iterator[Unit]:
    for number, fields in enumerate(_drawn(rng, make, key)):
        line = json.dumps(fields)
        yield Unit(text="\n" * (number > 0) + line, questions=_asked(fields, key, line))


def _settings(rng: Random, make: Callable[[Random], Fields], key: str) -> Iterator[Unit]:
    """Sections of key = value, or of key: value."""
    opening, between = rng.choice([("[{}]", " = "), ("{}:", ": ")])
    for number, fields in enumerate(_drawn(rng, make, key)):
        indent = "  " * (between == ": ")
        lines = [f"{indent}{name}{between}{value}" for name, value in fields.items() if name != key]
        head = opening.format(f"{key} {fields[key]}")
        yield Unit(text="\n\n" * (number > 0) + "\n".join([head, *lines]), questions=_asked(fields, key, head)[:-1])


_EVENTS: Mapping[str, tuple[str, str, str]] = {
    "auth": ("WARN", "user {person} entered a wrong password from {town}", "Where did {person} enter a wrong password?"),
    "login": ("INFO", "user {person} signed in, session {serial}", "Which session does {person} have?"),
    "store": ("INFO", "wrote {pieces} blocks to volume {code} in {time} ms", "How long did writing to volume {code} take?"),
    "mail": ("ERROR", "message {serial} to {person} bounced", "Whose message bounced under the number {serial}?"),
    "queue": ("INFO", "job {code} waits behind {pieces} others", "How many jobs does {code} wait behind?"),
    "backup": ("ERROR", "copy of {code} stopped after {time} s", "After how many seconds did the copy of {code} stop?"),
    "guard": ("WARN", "account of {person} locked for {time} s", "For how long is the account of {person} locked?"),
}


def _log(rng: Random) -> Iterator[Unit]:
    second, day, host = rng.randrange(20_000), words.date(rng), rng.choice(words.TOWNS).lower()
    number = 0
    while True:
        service = rng.choice(list(_EVENTS))
        level, message, question = _EVENTS[service]
        facts = {
            "person": words.person(rng),
            "town": rng.choice(words.TOWNS),
            "serial": words.serial(rng),
            "code": words.code(rng),
            "pieces": rng.randrange(2, 400),
            "time": rng.randrange(3, 9000),
        }
        second = min(second + rng.randrange(1, 90), 86_399)
        clock = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        line = f"{day} {clock} {host} {service}[{rng.randrange(100, 999)}] {level}: {message.format(**facts)}"
        asked = (question.format(**facts), f"What was logged right after this? {message.format(**facts)}")
        yield Unit(text="\n" * (number > 0) + line, questions=asked)
        number += 1
