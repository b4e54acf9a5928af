"""LKV's training: learn head budgets and entry scores by distillation from the full cache (arXiv 2605.06676)."""
