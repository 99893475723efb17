"""The web demo (extra ``demo``). Only :mod:`.page` and :mod:`pra.commands.demo` know its web framework."""
