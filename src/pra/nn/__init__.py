"""Building blocks that know nothing of images being generated: patches, rotary embedding, attention, blocks."""
