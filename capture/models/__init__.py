"""Adapter of Hugging Face models: structure, sites, hooks, prompts and image tokens."""
