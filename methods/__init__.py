"""Relatives of the methods at the top: each file is the difference, and no more."""
