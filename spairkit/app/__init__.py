"""A page in the browser to look at objects and correct them: `spairkit app`."""
