"""From records to a dataset: which stay, in which split and shard, and what leaks between splits."""
