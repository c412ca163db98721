"""The model with its MLPs replaced by a transcoder, and interventions on the transcoder's features."""
