"""Training: losses, the module, the run folder, the trainer."""
