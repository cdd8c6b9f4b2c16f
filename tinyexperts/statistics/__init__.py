"""Statistics of runs: intervals over seeds, parabolas, scaling laws, compute multipliers; numbers in, numbers out."""
