"""How state is kept, loaded and gathered."""
