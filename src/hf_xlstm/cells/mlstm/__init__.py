"""The mLSTM: matrix memory, parallel over time (Beck et al. 2024, eq. 19-27)."""
