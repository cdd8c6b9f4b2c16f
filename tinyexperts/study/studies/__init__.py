"""The studies: the paper's figures and tables as grids of runs, and three that it leaves open; a file each."""
