"""`trl_spatial serve`: a SpatialScore in its own process, which scores images over HTTP.

Requests from all clients are combined into batches. `POST /score` takes prompts and images, `GET /health` and the page at `/`
show the state of the server. [`~trl_spatial.rewards.RemoteReward`] is the client: `trl_spatial grpo --rewards http://HOST:PORT`.

If a token is set (`--token-file`, or `TRL_SPATIAL_SERVER_TOKEN` on both sides), only clients that send it are served. The
connection is not encrypted: outside a trusted network, put a TLS proxy in front.

The client retries failed requests. If the server is gone, its rewards are missing, not 0: an image without any reward is not
trained on, a warning says so, and `rewards/remote_score/frac_none` counts it.

Needs the extra `serve`; only the command imports this package.
"""
