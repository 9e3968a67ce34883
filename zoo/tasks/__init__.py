"""Lightning modules for classification, restoration and diffusion."""
