"""The protocol files of gRPC clients; the root for protoc is `cluster/api/proto`."""
