"""What `headwise inspect` says and draws of a file."""
