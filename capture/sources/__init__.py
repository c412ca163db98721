"""Sources of prompts and images: files, folders, Hugging Face datasets and the toy tasks."""
