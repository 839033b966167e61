"""Use of trained models: loading them from runs and exported folders, and predictions for texts."""
