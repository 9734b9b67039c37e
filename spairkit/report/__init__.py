"""Pictures, charts and the HTML page of a run: self-contained, without scripts or network."""
