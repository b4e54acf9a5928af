"""What to keep: scores of entries, and how many of them each head keeps. Arithmetic on tensors; no model."""
