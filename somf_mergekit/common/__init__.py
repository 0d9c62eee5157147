"""What knows nothing of masks: errors, files, digests, the machine, the process group."""
