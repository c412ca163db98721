"""The document of an attribution graph as files: JSON and a self-contained web page; opened, or served."""
