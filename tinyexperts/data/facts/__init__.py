"""Facts as text: a table of entities becomes statements in several phrasings, some held out by design."""
