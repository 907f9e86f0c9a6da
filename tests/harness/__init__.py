"""What tests, demo and bench share: the pack as `likeness`, the host in this process, the real server."""
