"""The checks of routers: topk_softmax, topk_sigmoid, grouped_topk."""
