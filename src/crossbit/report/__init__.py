"""What a run is shown with: plots, HTML pages and the model card."""
