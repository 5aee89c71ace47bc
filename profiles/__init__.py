"""What devices, links and workloads are: data, and its typed loaders."""
