"""One step: `collate` noises examples and pairs them with captions, `engine` runs the pairs."""
