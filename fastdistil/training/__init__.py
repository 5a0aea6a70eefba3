"""What the training loop is made of: inputs, state, optimizer, guards, checkpoints, log lines."""
