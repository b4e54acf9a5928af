"""Draft conversations: chats of a help desk, one after another, and an interview."""

from collections.abc import Iterator
from random import Random

from headwise.offline.texts import words
from headwise.offline.texts.document import Draft, Unit


def dialogue(rng: Random) -> Draft:
    """Draft a transcript of chats, or an interview."""
    return _chats(rng) if rng.random() < 0.5 else _interview(rng)


_GREETINGS = (
    "Hello, this is {agent}. What can I do for you?",
    "Good morning, you are talking to {agent}. How can I help?",
    "Thanks for waiting. My name is {agent}, what is the matter?",
)
_PROBLEMS = (
    ("Hi, I bought a {product} in {month} and it {fault}.", "What is wrong with the {product} of {customer}?"),
    ("My {product} {fault} since {day}. I have tried everything.", "Since when has {customer} had the trouble?"),
    ("I ordered a {product}, but it never came to {town}.", "What did {customer} order, and where was it to go?"),
    ("You charged me {money} twice for the same {product}.", "How much was {customer} charged twice?"),
    ("The {product} that I got is not the one on the picture. It also {fault}.", "Why is {customer} not content?"),
)
_FAULTS = (
    "makes a grinding noise",
    "does not turn on",
    "smells of burnt plastic",
    "stops after {number} minutes",
    "shows error {number}",
    "leaks at the bottom",
    "cannot be paired with my phone",
)
_ASKS = (
    (
        "I see. Could you give me the order number?",
        "It is {code}, from {date}.",
        "What is the order number of {customer}?",
    ),
    ("Which address is that for?", "{number} Mill Lane, {town}.", "What is the address of {customer}?"),
    (
        "What does the label on the back say?",
        "Let me look. It says {serial}.",
        "What does the label of {customer} say?",
    ),
    ("Have you tried it with another cable?", "Yes, with two of them. No change.", "What has {customer} tried?"),
    (
        "Who signed for the parcel?",
        "Somebody called {other}. I know nobody of that name.",
        "Who signed for the parcel?",
    ),
    ("How would you like to be told?", "Write to me, or ring {number} after six.", "How can {customer} be reached?"),
    (
        "How often does it happen?",
        "About {small} times a day, mostly in the evening.",
        "How often does it happen to {customer}?",
    ),
    ("Is there still a receipt?", "Yes, it says {money}, paid in {town}.", "What does the receipt of {customer} say?"),
)
_PROMISES = (
    ("I will send a new one, it should be there on {day}.", "When will {customer} get a new one?"),
    ("You get {money} back within {small} days.", "How much will {customer} get back?"),
    ("A colleague from {team} is going to call you on {day}.", "Who is going to call {customer}, and when?"),
    ("Please take it to our shop in {town}, they know about it under {code}.", "Where should {customer} take it?"),
)
_THANKS = ("Thank you, that helps a lot.", "All right, I will wait for that.", "Good. Have a nice day!", "I hope so.")


def _facts(rng: Random) -> dict[str, str]:
    customer = words.person(rng)
    facts = {
        "agent": rng.choice([name for name in words.FIRST if name not in customer]),
        "customer": customer,
        "other": words.person(rng),
        "product": rng.choice(words.PRODUCTS),
        "month": rng.choice(words.MONTHS),
        "day": rng.choice(words.DAYS),
        "town": rng.choice(words.TOWNS),
        "money": f"{words.money(rng)} euros",
        "number": str(rng.randrange(12, 9_000)),
        "small": str(rng.randrange(2, 12)),
        "team": rng.choice(words.TEAMS),
        "code": words.code(rng),
        "serial": words.serial(rng),
        "date": words.date(rng),
    }
    return facts | {"fault": rng.choice(_FAULTS).format(**facts)}


def _chats(rng: Random) -> Draft:
    def units() -> Iterator[Unit]:
        number, gap = rng.randrange(200, 9_000), ""
        while True:
            facts = _facts(rng)
            agent, customer = facts["agent"], facts["customer"].split()[0]
            yield Unit(text=f"{gap}Chat {number}, {facts['day']}, {facts['customer']}")
            gap = "\n\n"
            yield Unit(text=f"\n{agent}: {rng.choice(_GREETINGS).format(**facts)}")
            sentence, document_question = rng.choice(_PROBLEMS)
            yield Unit(text=f"\n{customer}: {sentence.format(**facts)}", questions=(document_question.format(**facts),))
            for question, answer, document_question in rng.sample(_ASKS, rng.randrange(2, 5)):
                facts |= {name: _facts(rng)[name] for name in ("number", "town", "code")}
                yield Unit(text=f"\n{agent}: {question}")
                after = f"What does {agent} say after this? {answer.format(**facts)}"
                questions = (document_question.format(**facts), after)
                yield Unit(text=f"\n{customer}: {answer.format(**facts)}", questions=questions)
            sentence, document_question = rng.choice(_PROMISES)
            yield Unit(text=f"\n{agent}: {sentence.format(**facts)}", questions=(document_question.format(**facts),))
            yield Unit(text=f"\n{customer}: {rng.choice(_THANKS)}")
            number += rng.randrange(1, 4)

    general = (
        "Summarise each chat in one sentence.",
        "What was promised, and to whom?",
        "List the customers and what they complain about.",
        "Write the next turn of the conversation.",
        "Which questions does the help desk ask?",
        "Quote the first thing that a customer says.",
    )
    return Draft(domain="dialogue", units=units(), general=general)


_TURNS = (
    (
        "How did you become a {trade}?",
        "By chance. In {year} I moved to {town}, and my neighbour {other} needed a hand.",
    ),
    ("What was your first job?", "I carried {goods} at the market in {town} for {small} euros an hour."),
    ("Who taught you most?", "{other}, without any doubt. We shared a workshop in {town} until {year}."),
    ("Which day do you remember best?", "A {day} in {month} {year}. The roof came down, and nobody was hurt."),
    ("Do you still work every day?", "Not on {day}s. Then I cook, mostly with {goods}, which annoys my family."),
    ("What do people get wrong about your work?", "They think it is quiet. We have a {product} running all day long."),
    ("Was there a time when you wanted to stop?", "In {year}, yes. I owed {money} to {other} and slept in the van."),
    ("How many people work with you now?", "{small}, and two of them are from {town}, where I once failed an exam."),
    ("What would you buy if money did not matter?", "A better {product}. And a house near {town}, with an orchard."),
    ("Is there something that you always carry with you?", "A note with the number {number}. I will not say why."),
    (
        "You once worked for the {team} department of a bank?",
        "For {small} months. They still send me a card in {month}.",
    ),
    ("How do you choose your customers?", "They choose me. {other} came back {small} times before I said yes."),
    ("What comes next for you?", "A course in {town} from {month} on, and then a long walk along the coast."),
    (
        "Did your parents like the idea?",
        "My mother did. My father, who sold {goods}, did not speak to me until {year}.",
    ),
)
_FOLLOW_UPS = (
    ("Really? How long did that last?", "Longer than I thought: {small} years, with a pause in {year}."),
    ("And today?", "Today I would do it again, but in {town}."),
    ("Why?", "Ask {other}. I have forgotten the reason, and it does not matter any more."),
    ("Were you alone then?", "No, {other} was with me, and later a dog called {name}."),
)


def _interview(rng: Random) -> Draft:
    guest, host, trade = words.person(rng), rng.choice(words.FIRST), rng.choice(words.TRADES)
    marks = rng.choice([("Q", "A"), (host, guest.split()[0]), (host.upper(), guest.split()[1].upper())])

    def drawn(pair: tuple[str, str]) -> Iterator[Unit]:
        facts = _facts(rng) | {
            "trade": trade,
            "year": str(rng.randrange(1961, 2022)),
            "goods": rng.choice(words.GOODS),
            "name": rng.choice(words.FIRST),
        }
        question, answer = (text.format(**facts) for text in pair)
        questions = (
            f"How does {guest} answer this question? {question}",
            f"Quote the answer to: {question}",
            f"What is asked after this answer? {answer}",
        )
        yield Unit(text=f"\n\n{marks[0]}: {question}")
        yield Unit(text=f"\n{marks[1]}: {answer}", questions=questions)

    def units() -> Iterator[Unit]:
        yield Unit(text=f"A conversation with {guest}, {trade}, recorded in {rng.choice(words.TOWNS)}.")
        while True:
            for pair in rng.sample(_TURNS, len(_TURNS)):
                yield from drawn(pair)
                if rng.random() < 0.3:
                    yield from drawn(rng.choice(_FOLLOW_UPS))

    general = (
        f"Write a portrait of {guest} in five sentences.",
        "List the towns that are mentioned, and why.",
        f"Which people does {guest} mention?",
        "Which years are mentioned, and what happened in them?",
        "Write the next question and its answer.",
        "Quote the longest answer.",
    )
    return Draft(domain="dialogue", units=units(), general=general)
