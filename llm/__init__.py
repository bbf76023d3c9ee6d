"""Language models as prior knowledge: ask one, keep what it said, run the code it wrote out of harm's way."""
