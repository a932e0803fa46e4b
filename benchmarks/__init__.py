"""Measurements of the package: step time, its floor, and training to an accuracy."""
