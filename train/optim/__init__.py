"""Parameter groups, AdamW and Muon, and the schedules of learning rate and batch size."""
