"""What a device and a server do together: wire, server, client, plans, cascade."""
