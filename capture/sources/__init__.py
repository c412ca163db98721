"""Prompts and images for a capture: files, Hugging Face datasets, and the toy tasks."""
