"""Save, resume and rotate training state; export what serving engines load."""
