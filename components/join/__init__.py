"""Step join: impressions and actions of a window become interactions."""
