# Environment of every cluster node, the head included: `. docs/node-environment.sh` before
# `ray start`. The driver needs only the first variable.
export RAY_AUTH_MODE=token # token: ~/.ray/auth_token, or the file in RAY_AUTH_TOKEN_PATH
export RAY_USAGE_STATS_ENABLED=0

# Notice a silent link within half a minute instead of 7 minutes.
export RAY_grpc_client_keepalive_time_ms=5000
export RAY_grpc_client_keepalive_timeout_ms=5000
