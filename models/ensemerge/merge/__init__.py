"""Combine the weights of several models into one: methods on tensors, recipes that name them, the engine between."""
