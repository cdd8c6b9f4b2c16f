"""The token data set on disk: its index, its writer, its reader."""
