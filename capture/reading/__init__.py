"""Reading of stores: `open_store`, token filters, and shuffled batches for training."""
