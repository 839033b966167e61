"""Reading, comparing and reporting runs, and sweeps of many runs."""
