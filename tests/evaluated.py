"""Evaluation in one call, as `headwise eval --json` tells it."""

from headwise.evals.run import Evaluation, Summary, evaluate, summarise
from headwise.methods.keep import parse_keep
from headwise.tasks.suites import Sizes, make_tasks, parse_tasks


def evaluation_of(tokenizer, tasks, methods, keeps, samples=2, seed=0, length=512, **options) -> Evaluation:
    sizes = Sizes(samples=samples, length=length, seed=seed)
    return Evaluation(
        tasks=tuple(make_tasks(parse_tasks(tasks), tokenizer, sizes)),
        methods=tuple(methods),
        keeps=tuple(parse_keep(keep) for keep in keeps),
        seed=seed,
        **{"timed": 0, **options},
    )


def evaluated(model, tokenizer, tasks, methods, keeps, **options) -> list[Summary]:
    """Summaries of the methods that are named."""
    records = evaluate(model, tokenizer, evaluation_of(tokenizer, tasks, methods, keeps, **options))
    return [summary for summary in summarise(records) if summary.method in methods]
