"""Make the bundled models and preference pairs: pretraining, distilling, sampling pairs, evaluation."""
