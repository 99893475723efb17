"""The cost of sampling, counted and measured."""
