"""Looking inside a trained model: losses, reconstructions, attention, similarity."""
