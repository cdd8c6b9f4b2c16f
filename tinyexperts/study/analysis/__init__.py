"""The analysis of runs: read, compared, fitted, drawn, and brought to verdicts and tables."""
