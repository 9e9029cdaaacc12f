"""What long work needs: files that are whole or absent, checkpoints, many processes, signals, progress."""
