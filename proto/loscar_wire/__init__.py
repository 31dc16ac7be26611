"""The protocol on the wire: generated stubs, their mapping to the core's dataclasses, channels and statuses."""
