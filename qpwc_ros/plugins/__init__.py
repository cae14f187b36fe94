"""Estimators and outputs of the node, found through Python entry points."""
