"""One step: what is planned, what is checked first, factors, roots and directions."""
