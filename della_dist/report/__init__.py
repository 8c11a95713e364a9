"""What a person reads: statistics, model card."""
