"""The one place that talks to process groups: layout (pure integers), groups, collectives, vocabulary shards."""
