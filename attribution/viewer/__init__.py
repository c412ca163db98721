"""The static web page that shows an attribution graph."""
