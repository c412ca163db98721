"""Agreement of the replacement model with the model (`agreement`); evaluators of a training job (`during_training`)."""
