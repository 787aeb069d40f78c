"""The page at `/` for people: playground, requests and fleet, from plain files."""
