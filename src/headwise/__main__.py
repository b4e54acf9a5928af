"""`python -m headwise`, which is also what `accelerate launch -m headwise` runs."""

import sys

if __name__ == "__main__":
    try:
        from headwise.cli import main
    except KeyboardInterrupt:  # what is imported takes a moment
        print("headwise: interrupted.", file=sys.stderr)
        sys.exit(130)
    main()
