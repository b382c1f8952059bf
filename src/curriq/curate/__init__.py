"""The filtered corpus as the product: scores of windows and documents, and the documents worth keeping."""
