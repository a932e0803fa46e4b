"""Does it pay? Optimizers on real tasks, each at its best rate, by a protocol that can be rerun."""
