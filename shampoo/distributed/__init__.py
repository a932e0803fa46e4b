"""Ranks: their groups, how they agree, and what travels between them."""
