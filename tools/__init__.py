"""What only maintainers run; not installed."""
