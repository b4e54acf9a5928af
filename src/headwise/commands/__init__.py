"""The verbs of the command line, a file each; `headwise.cli` puts them together.

A verb is thin: it parses, calls the library and prints. Verbs share:

    options     types of the options that several have
    inputs      documents, questions and lists that options name
    texts       the texts of calibrate, profile and train
    loading     the model that --model names, and its default method
    tables      cells and lines that several tables have
    console     progress, tables and JSON
    streaming   an answer while it grows
    endings     exit codes, and errors as one line
"""
