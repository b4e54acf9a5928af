"""Texts to calibrate and train on, made on the user's machine from what every machine has, and from seeded word lists.

`mix.natural` makes them; `calibration` is the only module that calls it. A domain is a module with a function that
drafts a document of any length (document.py), and a draft is cut where a unit ends (cutting.py).

Kept apart from every evaluation: this package imports nothing of `evals`, has words and wordings of its own (a test
compares them with RULER's), and reads no file that an evaluation reads. The splits "calibration" and "train" read
different source files and have different seeds (sources.py).
"""
