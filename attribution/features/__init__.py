"""Experiments on features: ranking by influence, steering, and confidence intervals of what they measure."""
