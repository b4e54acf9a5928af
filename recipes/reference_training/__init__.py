"""How the reference model is trained, measured and exported; `recipes/reference_model.py` is the command."""
