"""Where metrics of a run are logged."""
