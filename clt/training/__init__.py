"""Training: the trainer, its loss, optimizers, schedules, metrics and checkpoints."""
