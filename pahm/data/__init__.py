"""Images in, tensors out: readers, the crop, augmentation, loading, shards."""
