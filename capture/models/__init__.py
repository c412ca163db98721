"""Hugging Face models behind one adapter: structure, sites, hooks, prompts and image tokens."""
