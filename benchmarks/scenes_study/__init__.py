"""The study on Scenes: variants, their metrics, and the page with the results."""
