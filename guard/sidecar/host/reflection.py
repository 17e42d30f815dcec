"""gRPC reflection, which shows the protocol's service under its real name and not under guard's private one."""

from collections.abc import Sequence
from typing import Protocol

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from guard.protocol import SERVICE, inference_pb2


class Registry(Protocol):
    """A server, or what collects handlers for one."""

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Add handlers."""


def enable(server: Registry) -> None:
    """Let clients such as grpcurl list and describe the services."""
    # A pool of its own, so that the real name does not collide with another copy of the protocol.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_renamed(inference_pb2.DESCRIPTOR.package, SERVICE.rpartition(".")[0]))
    names = [SERVICE]
    for module in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        names += [service.full_name for service in module.DESCRIPTOR.services_by_name.values()]
    # What `reflection.enable_server_reflection` does for an asynchronous server.
    servicer = reflection.aio.ReflectionServicer(names, pool=pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)


def _renamed(old: str, new: str) -> descriptor_pb2.FileDescriptorProto:
    """Guard's copy of the protocol, with the package name that clients know."""
    file = descriptor_pb2.FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(file)
    file.package = new

    def rename(name: str) -> str:
        return f".{new}{name.removeprefix(f'.{old}')}" if name.startswith(f".{old}.") else name

    def rename_fields(message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            if field.type_name:
                field.type_name = rename(field.type_name)
        for nested in message.nested_type:
            rename_fields(nested)

    for message in file.message_type:
        rename_fields(message)
    for service in file.service:
        for method in service.method:
            method.input_type, method.output_type = rename(method.input_type), rename(method.output_type)
    return file
