"""`headwise report` of evaluations: results in, a page, CSV, Markdown and a picture out."""
