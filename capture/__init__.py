"""Model and images to activations on disk: adapter, hooks, store, loader."""
