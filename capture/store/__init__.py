"""Format of the activation store: schema, layout, arrays, shards, records and read order."""
