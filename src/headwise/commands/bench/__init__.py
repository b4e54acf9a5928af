"""`headwise bench`: speed and memory, next to the full cache; a verb a file, and what they share."""
