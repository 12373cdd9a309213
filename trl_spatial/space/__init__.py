"""`trl_spatial space`: a page that ranks images for a prompt, here or as a Space on the Hub."""
