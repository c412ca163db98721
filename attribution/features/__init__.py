"""What a feature is and does: steering and, later, statistics and ranking."""
