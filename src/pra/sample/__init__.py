"""Pictures from a model: ``pra sample`` and ``pra complete``, on one process or many."""
