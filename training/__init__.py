"""Learns a transformer: shards -> objective -> loop -> checkpoints -> an exported model folder."""
