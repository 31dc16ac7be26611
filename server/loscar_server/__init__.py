"""The parameter server: the core's server machine on gRPC. Knows no torch."""
