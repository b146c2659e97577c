"""Parameter groups, Muon, and the schedules of learning rate and batch size."""
