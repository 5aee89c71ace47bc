"""The device's side of the split: asking a server, and doing without it."""
