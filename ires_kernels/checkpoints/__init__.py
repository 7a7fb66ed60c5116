"""What lies on a disk: headers, manifests, checkpoints, names of tensors, side files and what they say."""
