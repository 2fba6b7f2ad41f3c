"""Data in and out: where rows come from (`sources`), what they are cleaned of (`clean`), the `product`."""
