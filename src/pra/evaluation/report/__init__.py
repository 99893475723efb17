"""A run's report: one self-contained page from what lies in its folder."""
