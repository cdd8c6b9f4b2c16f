"""Runs carried out: processes side by side or a job array, the folder of a study, and what became of each run."""
