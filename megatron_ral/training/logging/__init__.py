"""What a run shows of itself: scalars, pictures and text, throughput, charts."""
