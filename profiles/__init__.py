"""What devices, links, workloads and traffic are: data, and its typed loaders."""
