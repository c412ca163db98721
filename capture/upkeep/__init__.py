"""Status, verification, repair, statistics and export of stores."""
