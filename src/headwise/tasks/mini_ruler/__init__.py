"""mini-RULER: tasks with a small vocabulary, for the bundled model."""
