"""Fine-tuning of an encoder on labelled images, by the recipes of MAE, DeepMIM and MIRL."""
