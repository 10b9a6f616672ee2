"""The shapes world: a small Stable Diffusion 3 of drawn shapes, and an oracle that reads its images."""
