"""From what a user has (folders, manifests, others' shards) to shards with an index, and a page that shows them."""
