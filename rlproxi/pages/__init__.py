"""What people look at: the report, the curation page, and the pieces of HTML and figures that they share."""
