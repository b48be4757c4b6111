"""What lives in the Ray cluster: the Serve replicas that hold a router or an expert host."""
