"""Networks on one image in bounded memory: strips of rows pass through them, on the weights of their own layers."""
