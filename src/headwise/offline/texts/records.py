"""Draft tables, JSON records, log lines and lists of settings: every record has facts that can be looked up."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from headwise.offline.texts import words
from headwise.offline.texts.document import Draft, Unit

Fields = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """A kind of record: how one is made, which field names it, and general questions by the fields they need."""

    make: Callable[[Random], Fields]
    key: str
    person: str
    general: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Records:
    """The records of one document: all of one kind, with some of its fields."""

    rng: Random
    kind: _Kind
    shown: tuple[str, ...]

    def __iter__(self) -> Iterator[Fields]:
        taken: set[str] = set()
        while True:
            fields = self.kind.make(self.rng)
            if fields[self.kind.key] not in taken:
                taken.add(fields[self.kind.key])
                yield {name: fields[name] for name in self.shown}

    @property
    def general(self) -> tuple[str, ...]:
        """Questions on all records."""
        questions = [question for name in self.shown for question in self.kind.general.get(name, ())]
        return (*questions, "Add the next record in the same format.")

    def questions(self, fields: Fields) -> tuple[str, ...]:
        """Return questions on one record."""
        key, person = self.kind.key, self.kind.person
        name = f"{key} {fields[key]}"
        looked_up = [f'What does the record of {name} say under "{field}"?' for field in self.shown if field != key]
        backwards = [f"Which {key} belongs to {fields[person]}? Copy the record."] if person in fields else []
        return (*looked_up, *backwards, f"Copy the record of {name} and the one after it.")


def table(rng: Random) -> Draft:
    """Draft orders or staff, as CSV or Markdown."""
    rows = _draw_rows(rng)
    return Draft(domain="table", units=rng.choice([_csv, _markdown])(rows), general=rows.general)


def records(rng: Random) -> Draft:
    """Draft JSON, settings, or a log."""
    if rng.random() < 1 / 3:
        return Draft(domain="records", units=_log(rng), general=_OF_LOGS)
    rows = _draw_rows(rng)
    return Draft(domain="records", units=rng.choice([_json_array, _json_lines, _settings])(rows), general=rows.general)


def _draw_rows(rng: Random) -> _Records:
    kind = rng.choice(_KINDS)
    names = [name for name in kind.make(rng) if name != kind.key]
    dropped = set(rng.sample(names, rng.randrange(3)))
    return _Records(rng=rng, kind=kind, shown=(kind.key, *(name for name in names if name not in dropped)))


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


_KINDS = (
    _Kind(
        make=_order,
        key="order",
        person="customer",
        general={
            "state": ("Which orders were cancelled? List their numbers.", "How many orders were shipped?"),
            "town": ("List the towns that orders went to, each once.",),
            "date": ("Which order is the oldest?",),
            "price": ("Which order has the highest price?",),
        },
    ),
    _Kind(
        make=_employee,
        key="badge",
        person="name",
        general={
            "team": ("Which badges belong to logistics? List them.", "Which teams are there? Name each once."),
            "start": ("How many people started before 2010?", "Which badge was given out first?"),
            "salary": ("Which badge has the highest salary?",),
        },
    ),
)
_OF_LOGS = (
    "List all lines that report an error.",
    "Which service logs most often?",
    "Which accounts were locked, and when?",
    "What happened last?",
    "Add the next line in the same format.",
    "How many warnings are there?",
)


def _csv(rows: _Records) -> Iterator[Unit]:
    mark = rows.rng.choice([",", ";", "\t"])
    for number, fields in enumerate(rows):
        head = "\n" if number else mark.join(fields) + "\n"
        yield Unit(text=head + mark.join(fields.values()), questions=rows.questions(fields))


def _markdown(rows: _Records) -> Iterator[Unit]:
    for number, fields in enumerate(rows):
        head = "" if number else f"| {' | '.join(fields)} |\n|{'---|' * len(fields)}"
        yield Unit(text=f"{head}\n| {' | '.join(fields.values())} |", questions=rows.questions(fields))


def _json_array(rows: _Records) -> Iterator[Unit]:
    for number, fields in enumerate(rows):
        body = ",\n".join(f'    "{name}": {json.dumps(value)}' for name, value in fields.items())
        yield Unit(text=f"{',' if number else '['}\n  {{\n{body}\n  }}", questions=rows.questions(fields))


def _json_lines(rows: _Records) -> Iterator[Unit]:
    for number, fields in enumerate(rows):
        yield Unit(text="\n" * (number > 0) + json.dumps(fields), questions=rows.questions(fields))


def _settings(rows: _Records) -> Iterator[Unit]:
    """Yield sections of key = value, or of key: value."""
    opening, between, indent = rows.rng.choice([("[{}]", " = ", ""), ("{}:", ": ", "  ")])
    for number, fields in enumerate(rows):
        (key, named), *other_fields = fields.items()
        lines = [opening.format(f"{key} {named}"), *(f"{indent}{name}{between}{value}" for name, value in other_fields)]
        yield Unit(text="\n\n" * (number > 0) + "\n".join(lines), questions=rows.questions(fields))


_EVENTS: Mapping[str, tuple[str, str, str]] = {
    "auth": (
        "WARN",
        "user {person} entered a wrong password from {town}",
        "Where did {person} enter a wrong password?",
    ),
    "login": ("INFO", "user {person} signed in, session {serial}", "Which session does {person} have?"),
    "store": (
        "INFO",
        "wrote {pieces} blocks to volume {code} in {time} ms",
        "How long did writing to volume {code} take?",
    ),
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
        questions = (question.format(**facts), f"What was logged right after this? {message.format(**facts)}")
        yield Unit(text="\n" * (number > 0) + line, questions=questions)
        number += 1
