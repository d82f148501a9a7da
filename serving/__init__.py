"""One engine that anonymizes and recovers, offered over HTTP with metrics and a web page."""
