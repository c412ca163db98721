"""Capture of model activations: model adapter, hooks, prompt sources, store and loader."""
