"""Pages for people: the report, the curation page, and the HTML and figures that they share."""
