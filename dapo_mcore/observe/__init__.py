"""What a run shows and keeps: phase times, metrics, sinks, sample completions, the live view and the plots."""
