"""From a prompt to an attribution graph and its checks."""
