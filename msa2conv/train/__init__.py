"""Training: label-free distillation of a hybrid."""
