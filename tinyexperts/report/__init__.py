"""What every page and table is made of: the style of figures, numbers as text, tables, the page."""
