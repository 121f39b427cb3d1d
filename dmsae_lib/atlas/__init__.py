"""The core atlas: what each latent of a core fires on and does, measured from a run, and a page of it."""
