"""The messages of the Open Inference Protocol's gRPC service, by their names.

They are described in a pool of their own. In protobuf's default pool they would collide with
those of a client library in the same process (tritonclient, kserve), which have the same
names; and code made by protoc would tie EdgeCLIP to protobuf's major version.
"""

from functools import cache
from importlib.resources import files

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClassesForFiles

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
_DESCRIPTORS = "grpc_oip.binpb"  # made from grpc_oip.proto, which says how


def message_type(name: str) -> type[Message]:
    """The class of a message, such as "ModelInferRequest".

    Raises:
        KeyError: the service has no such message.
    """
    return _message_types()[f"{PACKAGE}.{name}"]


@cache
def _message_types() -> dict[str, type[Message]]:
    described = FileDescriptorSet.FromString(files(__package__).joinpath(_DESCRIPTORS).read_bytes())
    pool = DescriptorPool()
    for file in described.file:
        pool.Add(file)
    names = [file.name for file in described.file]
    found: dict[str, type[Message]] = GetMessageClassesForFiles(names, pool)
    return found
