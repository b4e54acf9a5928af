"""What the commands print and how they end; `headwise.cli` has the commands."""
