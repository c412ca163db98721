"""Format of the activation store: schema, layout, arrays, shards, moments and file records."""
