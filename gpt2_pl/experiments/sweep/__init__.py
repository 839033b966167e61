"""Sweeps: grids of tasks, strategies and seeds."""
