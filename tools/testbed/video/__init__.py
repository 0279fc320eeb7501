"""The same for clips."""
