"""The replacement model with its interventions, and the frozen and the linear model of one prompt."""
