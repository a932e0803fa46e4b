"""What outlives a step: ``optimizer.state`` copied, pickled, loaded, and gathered to be saved."""
