"""What runs on the device and what on the server, from measured times."""
