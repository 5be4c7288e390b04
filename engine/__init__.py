"""What one run stands on: its options, devices and signals, folder, labels, fast paths, saving and restoring."""
