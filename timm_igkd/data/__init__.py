"""Images in: a dataset opened by name, each image with its label and content key."""
