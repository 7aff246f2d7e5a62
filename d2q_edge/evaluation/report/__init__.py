"""Show a comparison as an HTML page or as pictures. Needs the extra d2q-edge[report]."""
