"""Upload and download of transcoders and stores on the Hugging Face hub."""
