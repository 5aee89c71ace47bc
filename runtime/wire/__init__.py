"""What crosses the network between device and server."""
