"""`trl_spatial demo`: a reward model and a tiny text-to-image model, trained, measured and shown on one page."""
