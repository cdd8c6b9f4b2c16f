"""What benchmarks/peer_packages.py measures, one file a part: exactness, speed, memory, loss on facts."""
