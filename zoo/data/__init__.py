"""Lightning data modules: images with classes, and photos with degradations made on the fly."""
