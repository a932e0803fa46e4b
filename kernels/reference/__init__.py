"""What every op means, in plain PyTorch."""
