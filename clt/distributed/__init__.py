"""Ranks of a training job: the mesh, the exchange of codes, start-up, the watchdog."""
