"""The parameter log: what the trainer commits, the server applies and a restart replays, one format for all three."""
