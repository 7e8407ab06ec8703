"""What a teacher predicts after every token of a store, written beside it for distillation."""
