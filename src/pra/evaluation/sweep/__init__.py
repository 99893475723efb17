"""Which sampling settings suit a model: `pra sweep`."""
