"""Preference sets as they are looked at, compared, filtered and mixed."""
