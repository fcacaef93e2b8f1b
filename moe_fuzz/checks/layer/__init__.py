"""A layer's checks: the router's half by the rules of routers, the experts' half for that router's own decision."""
