"""Step sequences: interactions become the sequences that training reads."""
