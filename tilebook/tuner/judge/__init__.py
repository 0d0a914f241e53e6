"""What a candidate is worth: whether it is right, how long it takes, how sure that is. Runs in the GPU's process."""
