"""Texts with questions, and how answers are judged: mini-RULER, RULER, LongBench, your own files. No model."""
