"""Other ways to make a ViT cheaper, each in one file."""
