# What every node of a cluster, its head too, has in its environment: `. docs/node-environment.sh`
# before `ray start`. Of the driver the first line alone is asked.
export RAY_AUTH_MODE=token # the token: ~/.ray/auth_token, or the file that RAY_AUTH_TOKEN_PATH names
export RAY_USAGE_STATS_ENABLED=0

# A link that goes silent is noticed in half a minute, and not in seven.
export RAY_grpc_client_keepalive_time_ms=5000
export RAY_grpc_client_keepalive_timeout_ms=5000
