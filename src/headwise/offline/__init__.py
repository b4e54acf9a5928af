"""What is done once per model: calibration texts, profiles, budgets, training."""
