"""Memory, traffic, arithmetic and projected speed of a training job, counted before it runs (`clt plan`)."""
