"""RULER (arXiv 2404.06654): the official templates, any tokenizer and length."""
