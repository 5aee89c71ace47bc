"""The server: models over HTTP and gRPC, in the Open Inference Protocol."""
