"""How tensors are cut into blocks, who owns them, where their state lies, what of it is shown."""
