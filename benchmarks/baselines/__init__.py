"""Quality of our transcoders against other projects' training on the toy model (`clt bench baselines`)."""
