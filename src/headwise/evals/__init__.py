"""Measuring methods: tasks, answers from a compressed cache, comparison tables."""
