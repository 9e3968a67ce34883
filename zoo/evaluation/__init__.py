"""What is measured and how: metrics, the papers' protocols, restorers on pairs of images, generated images by FID-C."""
