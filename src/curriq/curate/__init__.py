"""The filtered corpus as the product: scores of every window and document, and the documents worth keeping."""
