"""Runs carried out: processes in parallel or a job array, the folder of a study, and the state of each run."""
