"""Training a model to survive eviction: the LightningModule and what it steps with."""
