"""Images: sources, the sample plan, decoders and the loaders of a pipeline's stages."""
