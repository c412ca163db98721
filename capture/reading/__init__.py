"""Reading a store: `open_store`, token filters, and shuffled batches for training."""
