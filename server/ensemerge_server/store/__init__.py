"""Predictions and the labels that come for them later: kept on disk, joined exactly once."""
