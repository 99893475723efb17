"""The commands of ``pra``: one file each."""
