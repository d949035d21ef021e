"""Turns images into tensors: readers, cropping, augmentation, loading and shards."""
