"""Everything that knows Hugging Face transformers' models: which are supported, and how attention is routed."""
