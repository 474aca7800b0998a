"""The sLSTM: scalar memory with memory mixing, sequential in time (Beck et al. 2024, eq. 8-18)."""
