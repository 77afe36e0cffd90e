"""The study on Scenes: variants, what is measured of them, and the page that says so."""
