"""A package outside the library that adds one of everything that the library lets others add."""
