"""Networks, backbones, text encoders, the autoencoder, LoRA, and the folders that hold them."""
