"""Messages and stubs of the gRPC API ``mien.v1``, generated from ``serving/proto`` by ``make proto`` (grpc extra)."""
