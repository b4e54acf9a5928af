"""The command `headwise`, and `python -m headwise`, which is also what `accelerate launch -m headwise` runs."""

import sys

NEEDED = ("rich", "tqdm", "typer")  # the extra `cli`


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from headwise.cli import main as run
    except KeyboardInterrupt:  # what is imported takes a moment
        print("headwise: interrupted.", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        print("headwise: the command line needs typer, rich and tqdm: pip install 'headwise[cli]'", file=sys.stderr)
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
