"""What caches of diffusion models save, and what they cost: time and PSNR, against fewer steps in the same time."""
