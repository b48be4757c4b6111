"""`*_pb2*.py` are generated: `python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. cluster/api/proto/shoal/v1/*.proto`."""
