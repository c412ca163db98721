"""Check of one GPU machine in a few minutes: correctness, times of kernel variants, whole training steps."""
