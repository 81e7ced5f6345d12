"""Sequences to token ids: the byte tokenizer, and any Hugging Face tokenizer behind one contract."""
