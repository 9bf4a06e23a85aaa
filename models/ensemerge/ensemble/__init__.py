"""Combine the outputs of several models: combiners, what a model.yaml says of them, and the compiler."""
