"""`python -m headwise`, which is also what `accelerate launch -m headwise` runs."""

from headwise.cli import main

if __name__ == "__main__":
    main()
