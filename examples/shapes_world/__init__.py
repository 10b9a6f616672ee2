"""The shapes world: a small Stable Diffusion 3 of drawn shapes, and an oracle that reads its images."""

from diffusers_softrepa.compat import drop_torchvision_hints

drop_torchvision_hints()  # before diffusers' pipelines are imported, so that they are not the first lines of a program
