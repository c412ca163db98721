"""Training of this and other projects compared on the toy model: FVU, dead features, speed (`clt bench baselines`)."""
