"""Judges a model on faces it never saw, through saved files: how well it hides, and how well it gives back."""
