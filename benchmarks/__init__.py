"""Speed and memory of UniHema beside its peers, measured in one process: `make bench`."""
