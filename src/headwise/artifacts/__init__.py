"""What outlives a run: budgets, profiles and gates, in one format of safetensors files."""
