"""Speed and memory, beside what a good torch user would write."""
