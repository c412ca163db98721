"""Writing a store: units of rows, leases, and any number of worker processes."""
