"""Helpers for testing blocks: an example of each, and the one tolerance."""
