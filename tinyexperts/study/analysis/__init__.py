"""What runs say: results read, compared, fitted, judged, drawn and written as pages and tables."""
