"""ensemerge's server: hosts models, ensembles, merges and experiments behind the Open Inference Protocol.

Importing it loads neither torch nor onnx: it needs ONNX Runtime, numpy and what a server needs, nothing of training.
"""
