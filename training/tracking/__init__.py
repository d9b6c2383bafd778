"""Trackers: where a run records its metrics, one file per tracker behind one protocol."""
