"""The curriculum in the training loops of other libraries."""
