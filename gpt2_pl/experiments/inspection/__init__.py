"""Inspection of single runs: the rows, texts and slices on which a model errs."""
