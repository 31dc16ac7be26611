"""Generated from proto/loscar/v1/parameter_server.proto: `make proto`."""
