"""Runs after they have run: reading, comparing and reporting them, and running many."""
