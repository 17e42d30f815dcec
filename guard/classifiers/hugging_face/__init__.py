"""Hugging Face `CLIPModel` directories: configuration, tokenizer and weights, read without transformers."""
