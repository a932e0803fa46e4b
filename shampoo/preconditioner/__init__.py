"""Kinds of preconditioner, one a file."""
