"""Helpers of every room: devices, processes, signals, files, pictures."""
