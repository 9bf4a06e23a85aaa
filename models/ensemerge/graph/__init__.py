"""An ONNX graph as data: read and written, tidied, cut and joined, paired with another graph, run.

Knowledge about a network comes from here, never from a list kept by hand for each architecture.
"""
