"""Judges a model: the paper's tables beside its numbers, the baselines, the ablations and the attacks.

A *part* (:mod:`services.evaluate.parts`) measures one thing and gives a flat set of figures; the report is the union of
the parts' figures. Everything is scored on saved files: what is compared was encoded and decoded before.
"""
