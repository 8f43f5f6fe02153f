"""Language models that write candidates, and the requests to them."""
