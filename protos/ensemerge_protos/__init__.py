"""The contract between servers and clients: generated protobuf messages, in a descriptor pool of their own.

`inference_pb2` is the Open Inference Protocol, `health_pb2` the gRPC health protocol, `ensemerge_pb2` labels and
experiments. The pool is private so that this package can be imported beside others that define `inference.*`.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
