"""Writing of stores: units, manifest, leases, and the assignment of units to workers."""
