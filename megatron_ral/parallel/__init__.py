"""Communication between ranks: rank layout (pure integers), process groups, collectives, vocabulary shards, traffic."""
