"""Training data: textures → scenes → rendered samples → augmentation → batches. No TensorFlow here."""
