"""Entry points: arguments, logging and process groups."""
