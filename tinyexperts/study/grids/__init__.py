"""What is to be run and what it costs: scales, the studies' grids of runs, the account of a run."""
