"""What a training run is made of: optimiser, state, sharding, step, checkpoints, logs."""
