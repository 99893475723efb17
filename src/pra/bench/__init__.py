"""What sampling costs, counted and measured."""
