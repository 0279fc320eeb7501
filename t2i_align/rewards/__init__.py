"""Preference models: trained on one's own data, and audited."""
