"""Preference models: training, users, audits."""
