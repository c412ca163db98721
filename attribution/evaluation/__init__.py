"""Agreement of the replacement model with the model: after training (`agreement`) and during it (`during_training`)."""
