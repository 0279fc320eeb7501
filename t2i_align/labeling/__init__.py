"""What is added to data or made from scratch: scores, captions, perturbed captions, labels, whole sets."""
