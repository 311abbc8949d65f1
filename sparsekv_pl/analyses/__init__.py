"""LightningModules that look inside attention: python evaluate.py predict --config configs/analyze/NAME.yaml."""
