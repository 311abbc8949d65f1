"""Training a model to survive eviction: the LightningModule, its passes, optimizers and guards."""
