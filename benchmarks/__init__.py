"""`make bench`: one training step of ours against SAELens's and dictionary_learning's own (README.md in this
folder)."""
