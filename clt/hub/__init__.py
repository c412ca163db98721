"""Transcoders by name: read from and sent to the Hugging Face hub."""
